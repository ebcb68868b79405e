"""Which modules stay FP32 among half ones, and how they meet these.

Norms with running statistics do, their own parameters and buffers: a running mean is a sum over many batches. Their
kernels take half activations beside these. Other types may be named instead, and stay FP32 with all that is in them:
their inputs are cast to FP32 and their outputs back to half, and what they make in between is FP32 by default.

Rotary embeddings do too: modules with no parameters that hold a buffer `inv_freq`. An angle is a position times such a
frequency, so what rounding takes from the frequency grows with the position: at 1024, half is wrong by tenths of a
radian, at 8192 by whole ones. Their inputs are left as they are, since it is the type of these that sines and cosines
are given in; where they are FP32 all the same they become half.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from .storage import fp32_to, half_to_fp32

RUNNING_NORMS = (_BatchNorm, _InstanceNorm)
FREQUENCIES = "inv_freq"
MADE_FOR_FP32_FREQUENCIES = "transformers."
"""Who gives angles too, and casts their sines and cosines itself."""


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

    def outputs_to_half(part: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(partial(fp32_to, dtype), output)

    handles: list[Any] = []
    within: set[nn.Module] = set()
    for part in module.modules():  # a module comes before its children
        if part not in kept or part in within:
            continue
        gives_half = is_rotary(part) and type(part).__module__.startswith(MADE_FOR_FP32_FREQUENCIES)
        if isinstance(part, RUNNING_NORMS):
            gives_half = type(part).__module__.startswith("torch.")  # a class of the user's may do more
        elif not is_rotary(part):
            within.update(part.modules())
            handles.append(part.register_forward_pre_hook(_inputs_to_fp32, with_kwargs=True))
            handles += _fp32_by_default(part)
        if not gives_half:
            handles.append(part.register_forward_hook(outputs_to_half))
    return handles


def _fp32_by_default(part: nn.Module) -> list[Any]:
    """Within the module's forward, new tensors are FP32. Gives the handles of the hooks."""
    before: list[torch.dtype] = []

    def enter(part: nn.Module, args: Any) -> None:
        before.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        torch.set_default_dtype(before.pop())

    return [part.register_forward_pre_hook(enter), part.register_forward_hook(leave, always_call=True)]


def _inputs_to_fp32(part: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(half_to_fp32, (args, kwargs))
