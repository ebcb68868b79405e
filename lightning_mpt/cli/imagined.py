"""This package's own part of an estimate: what its precisions and its CUDA kernel need, told without a device."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from .. import cross_entropy, masters, pieces
from ..base import MasterOptimizer
from ..kernels.reference import ReferenceKernel
from ..kernels.slots import Slot
from ..kernels.tiling import BLOCK, SCAN_BLOCK, elements_worth_a_launch, tile_counts
from ..precisions import trainer_arguments
from ..profiler.estimate import CPU, CUDA, Device

DEVICES = {"cuda": CUDA, "cpu": CPU}


def imagined_arguments(precision: str) -> Mapping[str, Any]:
    """What to give a Trainer of fake tensors for a precision of that name.

    All but one as they are. On CPU tensors `16-mixed` would be changed to bfloat16, and its GradScaler, which reads
    from the device whether a gradient overflowed, would skip steps: it is left out, and with it a few scalars.
    """
    if precision != "16-mixed":
        return trainer_arguments(precision)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class ImaginedKernel:
    """The tables and the scratch of the Triton kernel: which is all that it allocates, since it updates in place."""

    def __init__(self, model_numel: int) -> None:
        self.elements_worth_a_launch = elements_worth_a_launch(model_numel)
        self._tables: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def tables(self) -> Iterable[Tensor]:
        return self._tables.values()

    def adamw_(self, slots: Sequence[Slot], gradients: Sequence[Tensor], *_: Any, **__: Any) -> None:
        sizes = tuple(slot.weight.numel() for slot in slots)
        columns = 2 + len(slots[0].moments) * 2 + 2 if slots else 0
        self._keep("update", sizes, sum(tile_counts(sizes, BLOCK)) * 8 + len(sizes) * (columns + 1) * 8)

    def scan_gradients(self, gradients: Sequence[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]:
        sizes = tuple(gradient.numel() for gradient in gradients)
        tiles = sum(tile_counts(sizes, SCAN_BLOCK))
        self._keep("scan", sizes, tiles * 8 + len(sizes) * 16)
        torch.empty(2, tiles, dtype=torch.float32)
        # A constant, so that the host knows it: no step is skipped.
        return torch.tensor(0.0), torch.tensor(1.0) if norm else None

    def scan_each(self, gradients: Sequence[Tensor]) -> Tensor:
        self.scan_gradients(gradients, norm=False)
        return torch.zeros(len(gradients))

    def _keep(self, use: str, sizes: tuple[int, ...], table_bytes: int) -> None:
        if (use, sizes) not in self._tables:
            self._tables[use, sizes] = torch.empty(table_bytes, dtype=torch.uint8)


class ImaginedCrossEntropy:
    """What Triton's cross entropy allocates: its results."""

    def row_losses(self, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        losses, log_sums = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
        return losses, log_sums

    def gradient(self, logits: Tensor, target: Tensor, log_sums: Tensor, gradient: Tensor, ignore_index: int) -> Tensor:
        return torch.empty_like(logits)


class CountedReference(ReferenceKernel):
    """The update as it runs on a CPU, but for the first of every parameter, which is not counted and takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._began: set[int] = set()

    def adamw_(self, slots: Sequence[Slot], *arguments: Any, **options: Any) -> None:
        steps = {id(slot.step) for slot in slots}
        if steps <= self._began:
            super().adamw_(slots, *arguments, **options)
        self._began |= steps


def imagined_device(name: str) -> Device:
    """`cuda` or `cpu`, with what this package does differently on it. Good for one estimate."""
    device = DEVICES[name]
    conversion = ExitStack()

    @contextmanager
    def kernels() -> Iterator[None]:
        with device.kernels(), conversion, ExitStack() as stack:
            # What happens to masters before the first step is not counted: in one piece it takes less time.
            conversion.enter_context(mock.patch.object(masters, "piece_length", _in_one_piece))
            if name == "cuda":
                stack.enter_context(mock.patch.dict(pieces.LARGEST_PIECE, clear=True))  # pieces as large as there
                kernel_for = mock.Mock(return_value=ImaginedCrossEntropy())
                stack.enter_context(mock.patch.object(cross_entropy, "cross_entropy_kernel_for", kernel_for))
            yield

    def prepare(optimizer: Optimizer) -> None:
        conversion.close()
        device.prepare(optimizer)
        if isinstance(optimizer, MasterOptimizer):
            numel = sum(parameter.numel() for parameter in optimizer.parameters())
            kernel = ImaginedKernel(numel) if name == "cuda" else CountedReference()
            optimizer.__dict__["_kernels"] = {torch.device("cpu"): kernel}

    return replace(device, kernels=kernels, prepare=prepare)


def _in_one_piece(tensors: Sequence[Tensor], *_: Any) -> int:
    return max(1, sum(tensor.numel() for tensor in tensors))
