"""The update of all parameters in one pass, and cross entropy: in plain torch, the truth, and in Triton for CUDA."""

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ..storage import MasterStorage, MomentStorage
from .cross_entropy import CrossEntropyKernel, ReferenceCrossEntropy
from .reference import ReferenceKernel
from .slots import GradientTransform, Slot


class Kernel(Protocol):
    """What does the work of a step on one device. `reference.py` says what is what."""

    def adamw_(
        self,
        slots: Sequence[Slot],
        gradients: Sequence[Tensor],
        storage: MasterStorage,
        moments: MomentStorage,
        transform: GradientTransform,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        maximize: bool,
        found_inf: Tensor | None = None,
    ) -> None: ...

    def scan_gradients(self, gradients: Sequence[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]: ...

    def scan_each(self, gradients: Sequence[Tensor]) -> Tensor: ...

    elements_worth_a_launch: int
    """So many elements of gradients are worth waiting for, where parameters could be updated one by one."""

    def tables(self) -> Iterable[Tensor]:
        """What the kernel keeps on the device from step to step."""
        ...


def kernel_for(device: torch.device, model_numel: int = 0) -> Kernel:
    """The kernel for tensors on `device`: Triton's on CUDA, and on a CPU where TRITON_INTERPRET=1 asks for it.

    `model_numel` is how many parameters there are on the device.
    """
    if _by_triton(device):
        from .triton import TritonKernel

        return TritonKernel(model_numel)
    return ReferenceKernel(model_numel)


def cross_entropy_kernel_for(device: torch.device) -> CrossEntropyKernel:
    """The same for the cross entropy of half logits."""
    if _by_triton(device):
        from .triton import TritonCrossEntropy

        return TritonCrossEntropy()
    return ReferenceCrossEntropy()


def _by_triton(device: torch.device) -> bool:
    """Whether a device's kernels are Triton's."""
    wanted = device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return wanted and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    """A warning, once, where it is not."""
    installed = find_spec("triton") is not None
    if not installed:
        warnings.warn(
            "Triton is not installed: the update of master weights runs in plain torch, in many small steps. "
            "Install triton for a single one.",
            stacklevel=4,
        )
    return installed
