"""Numbers of the caller's that half does not reach: as large as a mask's, or as small as an eps.

A mask of -1e9, or of FP32's lowest number, becomes the last that half does reach. An eps of 1e-8 is zero in float16,
where it was to keep a divisor or a logarithm from zero: it becomes the smallest number that is not.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .storage import HALF_DTYPES
from .torch_functions import Function, Way, named

FILLS = named(
    "masked_fill masked_fill_ fill_ full full_like new_full index_fill index_fill_ fill_diagonal_ clamp clamp_ "
    "clamp_min clamp_min_ clamp_max clamp_max_ clip clip_ where"
) | {F.pad, F.threshold, F.hardtanh, torch._C._nn.pad_sequence}
"""What writes a number of the caller's into a tensor, and ends in an error where half does not reach so far."""

OFFSETS = named("add add_")
"""What adds a small number of the caller's, so that no root, logarithm or quotient meets a zero."""

FLOORS = {F.normalize: 1e-12, F.cosine_similarity: 1e-8}
"""What divides by norms of `eps` at least, its fourth argument, and what that is where none is given."""


def saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in half, what is finite in it too: a mask of -1e9 becomes the lowest number. A new one."""
    limit = torch.finfo(dtype).max
    if value.layout is not torch.strided or value.is_nested or _is_within(value, limit):
        return value.to(dtype, copy=True)
    wide = value.float()
    return torch.where(wide.isfinite(), wide.clamp(-limit, limit), wide).to(dtype)


def _is_within(value: Tensor, limit: float) -> bool:
    """Whether it is known that no magnitude is above `limit`: a host looks, a device is not waited for."""
    if type(value) is not Tensor or value.device.type != "cpu" or value.numel() == 0:
        return False
    lowest, highest = torch.aminmax(value)
    return bool(lowest >= -limit and highest <= limit)


def _saturated(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives, with the numbers that it was given inside the range of the half type that it writes."""
    dtype = kwargs.get("dtype") or _written_dtype([*args, *kwargs.values()])
    if dtype in HALF_DTYPES:
        args, kwargs = all_in_range(args, kwargs, dtype)
    return func(*args, **kwargs)


def _written_dtype(values: list[Any]) -> torch.dtype:
    """That of the tensor that is filled, or chosen from. Where there are none but masks, the numbers say it."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.dtype != torch.bool]
    if not tensors:
        return torch.get_default_dtype() if any(isinstance(value, float) for value in values) else torch.int64
    tensors.sort(key=lambda tensor: (tensor.dim() == 0, not tensor.is_floating_point()))
    return tensors[0].dtype


def _offset(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and isinstance(args[1], float) and args[0].dtype in HALF_DTYPES:
        args = (args[0], _not_zero(args[1], args[0].dtype))
    return func(*args, **kwargs)


def _floored(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtype = _written_dtype([*args, *kwargs.values()])
    if dtype not in HALF_DTYPES:
        return func(*args, **kwargs)
    eps = args[3] if len(args) > 3 else kwargs.get("eps", FLOORS[func])
    # Of a norm below the smallest normal number, half has hardly a digit.
    return func(*args[:3], **{**kwargs, "eps": max(eps, torch.finfo(dtype).smallest_normal)})


def all_in_range(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with their numbers in the range of `dtype`."""
    return tuple(_in_range(one, dtype) for one in args), {name: _in_range(one, dtype) for name, one in kwargs.items()}


def _in_range(value: Any, dtype: torch.dtype) -> Any:
    """`value`, or, where it is a number that `dtype` does not reach, the nearest that it does and that is not zero.

    A number may be an FP32 tensor without dimensions.
    """
    if isinstance(value, Tensor):
        return saturated(value, dtype) if value.dim() == 0 and value.dtype == torch.float32 else value
    if not isinstance(value, int | float):
        return value
    limit = torch.finfo(dtype).max
    return math.copysign(limit, value) if limit < abs(value) < math.inf else _not_zero(value, dtype)


def _not_zero(number: float, dtype: torch.dtype) -> float:
    """`number`, or the smallest of `dtype` where that would make zero of it."""
    range_of = torch.finfo(dtype)
    smallest = range_of.smallest_normal * range_of.eps
    return math.copysign(smallest, number) if 0 < abs(number) < smallest else number


WAYS: dict[Any, Way] = {
    **dict.fromkeys(FILLS, _saturated),
    **dict.fromkeys(OFFSETS, _offset),
    **dict.fromkeys(FLOORS, _floored),
}
