"""Which modules stay FP32 among half ones, and how they meet these.

Norms with running statistics do, their own parameters and buffers: a running mean is a sum over many batches. Their
kernels take half activations beside these. Other types may be named instead, and stay FP32 with all that is in them:
their inputs are cast to FP32 and their outputs back to half, and what they make in between is FP32 by default.

Rotary embeddings do too: modules with no parameters that hold a buffer `inv_freq`. An angle is a position times such a
frequency, so what rounding takes from the frequency grows with the position: at 1024, half is wrong by tenths of a
radian, at 8192 by whole ones. Their inputs are left as they are, since it is the type of these that sines and cosines
are given in. Where two tensors come out, these are sines and cosines, and become half; one alone may be the angles, and
stays as it is.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from .storage import fp32_to, half_to_fp32

RUNNING_NORMS = (_BatchNorm, _InstanceNorm)
FREQUENCIES = "inv_freq"


def kept_in_fp32(module: nn.Module, types: tuple[type[nn.Module], ...]) -> set[nn.Module]:
    """The modules in `module` whose own parameters and buffers stay FP32: of these types, and rotary embeddings."""
    kept: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, types) and not isinstance(part, RUNNING_NORMS):
            kept.update(part.modules())
        elif isinstance(part, types) or is_rotary(part):
            kept.add(part)
    return kept


def is_rotary(part: nn.Module) -> bool:
    """Whether a module gives the angles of rotary position embeddings, or their sines and cosines."""
    buffers = (name for name, _ in part.named_buffers(recurse=False))
    return any(FREQUENCIES in name for name in buffers) and next(part.parameters(), None) is None


def meet_half(module: nn.Module, kept: set[nn.Module], dtype: torch.dtype) -> list[Any]:
    """Register the casts around what is `kept` in FP32 within `module`. Gives their handles."""
    handles: list[Any] = []
    within: set[nn.Module] = set()
    for part in module.modules():  # a module comes before its children
        if part not in kept or part in within:
            continue
        if isinstance(part, RUNNING_NORMS):
            if not type(part).__module__.startswith("torch."):  # a class of the user's may do more
                handles.append(part.register_forward_hook(partial(_outputs_to_half, dtype)))
        elif is_rotary(part):
            handles.append(part.register_forward_hook(partial(_sines_to_half, dtype)))
        else:
            within.update(part.modules())
            fp32_by_default = _FP32ByDefault()
            handles += [
                part.register_forward_pre_hook(_inputs_to_fp32, with_kwargs=True),
                part.register_forward_pre_hook(fp32_by_default.enter),
                part.register_forward_hook(fp32_by_default.leave, always_call=True),
                part.register_forward_hook(partial(_outputs_to_half, dtype)),
            ]
    return handles


class _FP32ByDefault:
    """Between the two hooks new tensors are FP32."""

    def __init__(self) -> None:
        self._before: list[torch.dtype] = []

    def enter(self, part: nn.Module, args: Any) -> None:
        self._before.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        torch.set_default_dtype(self._before.pop())


def _inputs_to_fp32(part: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(half_to_fp32, (args, kwargs))


def _outputs_to_half(dtype: torch.dtype, part: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(partial(fp32_to, dtype), output)


def _sines_to_half(dtype: torch.dtype, part: nn.Module, args: Any, output: Any) -> Any:
    several = isinstance(output, list | tuple) and sum(isinstance(one, Tensor) for one in output) > 1
    return _outputs_to_half(dtype, part, args, output) if several else output
