"""FP32 tensors that meet half ones where torch wants one type.

A loss without reduction, a sum, or a tensor that the module keeps as no buffer is FP32, and where it goes on into a
layer torch raises an error, though the same runs in FP32. As under autocast, a product of both is one of half numbers;
and what is written into a tensor takes that tensor's type.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .half_range import all_in_range, saturated
from .storage import HALF_DTYPES
from .torch_functions import Function, Way, named

FLOATS = (*HALF_DTYPES, torch.float32)

PRODUCTS: frozenset[Any] = frozenset(
    {F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d}
    | {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.grid_sample, F.layer_norm, F.group_norm, F.prelu}
    | {F.rms_norm, torch.einsum}
) | named(
    "matmul __matmul__ __rmatmul__ mm bmm mv dot vdot vecdot inner cross multi_dot tensordot addmm addmv addr addbmm "
    "baddbmm"
)
"""What multiplies tensors that must be of one type: half, where one of them is."""

ATTENTION: tuple[Function, ...] = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
"""The same of queries, keys and values, the first three. The mask of scaled dot products may be FP32 beside them."""

ASSIGNMENTS = named("scatter scatter_") | {Tensor.__setitem__}
"""What may write a number."""

WRITES: frozenset[Any] = ASSIGNMENTS | named(
    "index_add index_add_ index_copy index_copy_ index_put index_put_ index_reduce index_reduce_ put_ scatter_add "
    "scatter_add_ scatter_reduce scatter_reduce_ masked_scatter masked_scatter_ lerp lerp_ addmm_ addmv_ addr_ addbmm_ "
    "baddbmm_"
)
"""What writes tensors into the first one, whose type they must have."""

TO_NUMPY: tuple[Function, ...] = (Tensor.numpy, Tensor.__array__)
"""What numpy has no bfloat16 for."""


def _in_half(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of FP32 and half tensors, which torch refuses: as under autocast, it is one of half ones."""
    half = _half_beside_fp32([*args, *kwargs.values()])
    if half is None or kwargs.get("out") is not None:  # that keeps its type
        return func(*args, **kwargs)
    narrowed = partial(_as, dtype=half)
    return func(*map(narrowed, args), **{name: narrowed(value) for name, value in kwargs.items()})


def _attention_in_half(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    half = _half_beside_fp32([*args, *kwargs.values()])
    if half is None:
        return func(*args, **kwargs)
    given: dict[str, Any] = {name: _as(kwargs[name], half) for name in ("query", "key", "value") if name in kwargs}
    if func is F.multi_head_attention_forward:  # adds the mask to scores that are half
        for name in ("attn_mask", "key_padding_mask"):
            mask = kwargs.get(name)
            if isinstance(mask, Tensor) and mask.dtype == torch.float32:
                given[name] = saturated(mask, half)
    return func(*[_as(value, half) for value in args[:3]], *args[3:], **(kwargs | given))


def _as_written(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is written has the type of what it is written into; a number that is assigned is within its range."""
    dtype = args[0].dtype if args else None
    if dtype is None or dtype not in FLOATS or kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if func in ASSIGNMENTS and dtype != torch.float32:
        args, kwargs = all_in_range(args, kwargs, dtype)
    return func(*[_as(one, dtype) for one in args], **{name: _as(one, dtype) for name, one in kwargs.items()})


def _half_beside_fp32(values: Sequence[Any]) -> torch.dtype | None:
    """The half type among these tensors, and lists of such, where FP32 is among them too."""
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    for value in values:
        if isinstance(value, list | tuple):
            dtypes.update(one.dtype for one in value if isinstance(one, Tensor))
    if torch.float32 not in dtypes:
        return None
    return next((dtype for dtype in HALF_DTYPES if dtype in dtypes), None)


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_as(one, dtype) for one in value])
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in FLOATS else value


def _wide_in_numpy(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].dtype != torch.bfloat16:
        return func(*args, **kwargs)
    array = func(args[0].float(), *args[1:], **kwargs)
    array.flags.writeable = False  # a copy: what is written to it would not reach the tensor
    return array


WAYS: dict[Any, Way] = {
    **dict.fromkeys(PRODUCTS, _in_half),
    **dict.fromkeys(WRITES, _as_written),
}
WAYS |= dict.fromkeys(ATTENTION, _attention_in_half) | dict.fromkeys(TO_NUMPY, _wide_in_numpy)
