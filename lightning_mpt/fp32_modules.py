"""Which modules stay FP32 among half ones, and how they meet these.

Norms with running statistics do: a running mean is a sum over many batches. Their kernels take half activations beside
FP32 parameters. Other types may be named instead; their inputs are cast to FP32 and their outputs back to half.

Rotary embeddings do too: modules with no parameters that hold a buffer `inv_freq`. An angle is a position times such a
frequency, so what rounding takes from the frequency grows with the position: at 1024, half is wrong by tenths of a
radian, at 8192 by whole ones. Their inputs are left as they are, since it is the type of these that sines and cosines
are given in; where they are FP32 all the same they become half.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from .storage import HALF_DTYPES

RUNNING_NORMS = (_BatchNorm, _InstanceNorm)
FREQUENCIES = "inv_freq"
MADE_FOR_FP32_FREQUENCIES = "transformers."
"""Who gives angles too, and casts their sines and cosines itself."""


def kept_in_fp32(module: nn.Module, types: tuple[type[nn.Module], ...]) -> set[nn.Module]:
    """The modules in `module` that stay FP32 with all that is in them: those of these types, and rotary embeddings."""
    kept: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, types) or is_rotary(part):
            kept.update(part.modules())
    return kept


def is_rotary(part: nn.Module) -> bool:
    """Whether a module gives the angles of rotary position embeddings, or their sines and cosines."""
    buffers = (name for name, _ in part.named_buffers(recurse=False))
    return any(FREQUENCIES in name for name in buffers) and next(part.parameters(), None) is None


def meet_half(module: nn.Module, kept: set[nn.Module], dtype: torch.dtype) -> list[Any]:
    """Register the casts around what is `kept` in FP32 within `module`. Gives their handles."""

    def outputs_to_half(part: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(lambda value: _cast(value, (torch.float32,), dtype), output)

    handles: list[Any] = []
    within: set[nn.Module] = set()
    for part in module.modules():  # a module comes before its children
        if part not in kept or part in within:
            continue
        within.update(part.modules())
        if is_rotary(part):
            if not type(part).__module__.startswith(MADE_FOR_FP32_FREQUENCIES):
                handles.append(part.register_forward_hook(outputs_to_half))
        elif not isinstance(part, RUNNING_NORMS):
            handles.append(part.register_forward_pre_hook(_inputs_to_fp32, with_kwargs=True))
            handles.append(part.register_forward_hook(outputs_to_half))
    return handles


def _inputs_to_fp32(part: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda value: _cast(value, HALF_DTYPES, torch.float32), (args, kwargs))


def _cast(value: Any, sources: tuple[torch.dtype, ...], target: torch.dtype) -> Any:
    return value.to(target) if isinstance(value, torch.Tensor) and value.dtype in sources else value
