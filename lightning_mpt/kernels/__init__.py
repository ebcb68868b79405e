"""The update of all parameters in one pass: `reference.py` in plain torch is the truth, `triton.py` is for CUDA."""

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..storage import MasterStorage, MomentStorage
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

    def tables(self) -> Iterable[Tensor]:
        """What the kernel keeps on the device from step to step."""
        ...


def kernel_for(device: torch.device, model_numel: int = 0) -> Kernel:
    """The kernel for tensors on `device`: Triton's on CUDA, and on a CPU where TRITON_INTERPRET=1 asks for it.

    `model_numel` is how many parameters there are on the device.
    """
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        try:
            from .triton import TritonKernel
        except ModuleNotFoundError as missing:
            if missing.name != "triton":
                raise
            warnings.warn(
                "Triton is not installed: the update of master weights runs in plain torch, in many small steps. "
                "Install triton for a single one.",
                stacklevel=2,
            )
        else:
            return TritonKernel()
    return ReferenceKernel(model_numel)
