"""The devices that a step can be estimated for: how their allocators round, and in what their kernels differ."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .corrections import BLOCK_BYTES, CUBLAS_WORKSPACE_BYTES, cuda_kernels, cuda_optimizer, unknowns
from .lstm import rule_holds, with_workspace
from .scratch import cpu_scratch, cpu_unknowns


@dataclass(frozen=True)
class Device:
    """A device that is imagined.

    Attributes:
        name: as `torch.device` writes it.
        block_bytes: its allocator rounds sizes up to a multiple of this.
        workspace_bytes: of a library, allocated once and kept; 0 for none.
        kernels: a context in which operations on CPU tensors have this device's results.
        scratch: from an operation and its arguments, the bytes that its kernel needs for itself.
        amend: from an operation, its arguments and its result, the result that it would have here.
        lstms_by_onednn: whether LSTMs are counted as oneDNN runs them.
        prepare: is given every optimizer before the first step.
        notes: what an estimate leaves out, of a module.
    """

    name: str
    block_bytes: int = 1
    workspace_bytes: int = 0
    kernels: Callable[[], AbstractContextManager[Any]] = nullcontext
    scratch: Callable[[Any, Any], int] = lambda func, args: 0
    amend: Callable[[Any, Any, Any], Any] = lambda func, args, result: result
    lstms_by_onednn: Callable[[], bool] = lambda: False
    prepare: Callable[[Optimizer], None] = lambda optimizer: None
    notes: Callable[[nn.Module], list[str]] = lambda module: []


CPU = Device("cpu", scratch=cpu_scratch, amend=with_workspace, lstms_by_onednn=rule_holds, notes=cpu_unknowns)
CUDA = Device("cuda", BLOCK_BYTES, CUBLAS_WORKSPACE_BYTES, kernels=cuda_kernels, prepare=cuda_optimizer, notes=unknowns)
