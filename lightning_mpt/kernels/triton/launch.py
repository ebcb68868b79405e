"""From parameters to one launch: tables of addresses, kept from step to step, and the kernel's options."""

import math
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton.language as tl
from torch import Tensor

from ...pieces import dense, ordered_like
from ...storage import MasterStorage, Moment, MomentStorage
from ..packs import joined
from ..slots import GradientTransform, Slot, Slots
from ..tiling import BLOCK, SCAN_BLOCK, TAIL, elements_worth_a_launch, tile_counts
from .formats import ITSELF, MASTER_FORMATS, MOMENT_FORMATS
from .scan import scan_kernel
from .update import adamw_kernel

KEPT_BYTES = 2**26
"""Tables for gradients that are not there any more go once all are larger than this."""
KEPT_SCANS = 8
"""But not the newest."""
REPLAYED: list[Tensor] = []
"""Tables that were made while a CUDA graph was captured, on the host: it copies them again whenever it is replayed."""
DTYPE = attrgetter("dtype")
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
COMPILE_OPTIONS = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": False}
"""128 registers for 128 threads: four programs at least share a multiprocessor, and nothing spills. Without fused
multiply-adds, which the compiler would place differently around each format, all formats compute alike: `split` and
`float32` masters stay equal bit for bit."""


class TritonKernel:
    """The kernels for one optimizer's tensors on one device. See `kernels/reference.py` for what is what.

    The host spends about a microsecond a tensor and step: what does not change is worked out once, and whether it has
    changed is asked of all tensors at a time.
    """

    def __init__(self, model_numel: int = 0) -> None:
        self.elements_worth_a_launch = elements_worth_a_launch(model_numel)
        self._updates: WeakKeyDictionary[Slots, dict[Hashable, list[_Update]]] = WeakKeyDictionary()
        """By the gradients' dtypes and the kernel's options."""
        self._scans: dict[Hashable, _Tiles] = {}

    def tables(self) -> Iterator[Tensor]:
        """What is kept on the device from step to step."""
        for tiles in self._scans.values():
            yield from tiles.tables()
        for kept in self._updates.values():
            for updates in kept.values():
                for update in updates:
                    yield from update.tables()

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
    ) -> None:
        """One launch for all slots whose weights share a dtype, as do their gradients.

        `found_inf` may have a number for each slot: where that is not zero, nothing of the slot changes.
        """
        multiplier, clip_value = transform
        beta1, beta2 = map(float, betas)
        hyperparameters = {
            **_number_or_tensor("multiplier", multiplier),
            **_number_or_tensor("lr", lr),
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "log_beta1": _log(beta1),
            "log_beta2": _log(beta2),
            "eps": float(eps),
            "weight_decay": float(weight_decay),
            "clip_value": 0.0 if clip_value is None else float(clip_value),
        }
        options = {
            "master_weights": storage.name,
            "optimizer_state": moments.name,
            "clip": clip_value is not None,
            "decoupled": decoupled,
            "maximize": maximize,
        }
        with torch.cuda.device_of(gradients[0]):  # Triton launches on the current device, whosever the tensors are
            for update in self._updates_of(Slots.of(slots), gradients, options):
                update.launch(gradients, found_inf, hyperparameters)

    def scan_gradients(self, gradients: Sequence[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]:
        """One read of all gradients. As `scan_gradients` of the reference."""
        scans = [self._scan(dtype, some)[1:] for dtype, (some, _) in _by_dtype(gradients).items()]
        if not scans:
            zero = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
            return zero, zero if norm else None
        squares, flags = (joined(list(parts)) for parts in zip(*scans, strict=True))
        return flags.amax(), squares.sum().sqrt() if norm else None

    def scan_each(self, gradients: Sequence[Tensor]) -> Tensor:
        """One read of all gradients. As `scan_each` of the reference."""
        found = torch.zeros(len(gradients), dtype=torch.float32, device=gradients[0].device)
        for dtype, (some, places) in _by_dtype(gradients).items():
            tiles, _, flags = self._scan(dtype, some)
            owners = tiles.owners.long()
            if places is not None:
                owners = _on_device(places, found.device)[owners]
            found.scatter_reduce_(0, owners, flags, "amax")
        return found

    def _scan(self, dtype: torch.dtype, gradients: Sequence[Tensor]) -> "tuple[_Tiles, Tensor, Tensor]":
        """The sum of squares of each tile, and whether one of its elements is not finite: float32."""
        if not all(map(Tensor.is_contiguous, gradients)):
            gradients = [dense(gradient) for gradient in gradients]
        tiles = self._tiles(dtype, gradients)
        squares, flags = torch.empty(2, tiles.count, dtype=torch.float32, device=gradients[0].device)
        with torch.cuda.device_of(squares):
            scan_kernel[(tiles.count,)](
                tiles.addresses_of(gradients), tiles.sizes, tiles.owners, tiles.numbers, squares, flags,
                GRADIENT=TYPES[dtype], BLOCK=SCAN_BLOCK, **COMPILE_OPTIONS,
            )  # fmt: skip
        return tiles, squares, flags

    def _updates_of(self, slots: Slots, gradients: Sequence[Tensor], options: dict[str, Any]) -> "list[_Update]":
        kept = self._updates.setdefault(slots, {})
        key = (*options.values(), *map(DTYPE, gradients))
        updates = kept.get(key)
        if updates is None:
            alike: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
            for index, (slot, gradient) in enumerate(zip(slots, gradients, strict=True)):
                if gradient.numel():
                    alike.setdefault((slot.weight.dtype, gradient.dtype), []).append(index)
            updates = [
                _Update(slots, indices, specialization(*dtypes, amsgrad=slots[0].max_exp_avg_sq is not None, **options))
                for dtypes, indices in alike.items()
            ]
            kept[key] = updates
        return updates

    def _tiles(self, dtype: torch.dtype, gradients: Sequence[Tensor]) -> "_Tiles":
        sizes = tuple(map(Tensor.numel, gradients))
        tiles = self._scans.get((dtype, sizes))
        if tiles is None:
            tiles = self._scans[dtype, sizes] = _Tiles(sizes, SCAN_BLOCK, gradients[0].device)
            self._forget_scans()
        return tiles

    def _forget_scans(self) -> None:
        if len(self._scans) <= KEPT_SCANS:
            return
        held = sum(table.nbytes for tiles in self._scans.values() for table in tiles.tables())
        while held > KEPT_BYTES and len(self._scans) > KEPT_SCANS:
            oldest = self._scans.pop(next(iter(self._scans)))
            held -= sum(table.nbytes for table in oldest.tables())


class _Tiles:
    """The tiles of tensors of these sizes, which programs work on, one each: tables on the device.

    Attributes:
        owners: which tensor each tile is of, and `numbers` which of that tensor's tiles: int32.
        sizes: the tensors' elements: int64.
    """

    def __init__(self, sizes: Sequence[int], block: int, device: torch.device) -> None:
        counts = torch.tensor(tile_counts(sizes, block), device="cpu")
        owners = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
        firsts = (counts.cumsum(0) - counts)[owners]
        self.count = len(owners)
        self.owners = _to_device(owners.int(), device)
        self.numbers = _to_device((torch.arange(self.count, device="cpu") - firsts).int(), device)
        self.sizes = _on_device(sizes, device)
        self._addresses: list[int] = []
        self._table: Tensor | None = None

    def tables(self) -> Iterator[Tensor]:
        yield from (self.owners, self.numbers, self.sizes)
        if self._table is not None:
            yield self._table

    def addresses_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """A table of where the tensors are. Gradients often lie where they lay a step ago, and it is still right."""
        addresses = list(map(Tensor.data_ptr, tensors))
        if self._table is None or addresses != self._addresses:
            self._addresses, self._table = addresses, _on_device(addresses, self.owners.device)
        return self._table


class _Update:
    """One launch of the update kernel, for the slots of some indices: all that stays the same from step to step."""

    def __init__(self, slots: Slots, indices: list[int], options: dict[str, Any]) -> None:
        self._options = options
        self._indices = None if len(indices) == len(slots) else indices
        self._weights = [slots[index].weight for index in indices]
        patterns = [dense(weight) for weight in self._weights]
        self._strides = list(map(Tensor.stride, patterns))
        self._tiles = _Tiles(list(map(Tensor.numel, patterns)), BLOCK, patterns[0].device)
        self._rows = [_row(slots[index]) for index in indices]
        # A weight that is not dense is updated as a dense copy, which is made anew in each step.
        self._scattered = [
            place
            for place, (weight, pattern) in enumerate(zip(self._weights, patterns, strict=True))
            if weight is not pattern
        ]
        self._table = _on_device([number for row in self._rows for number in row], patterns[0].device)
        self._places = None if self._indices is None else _on_device(indices, self._table.device)

    def tables(self) -> Iterator[Tensor]:
        yield from self._tiles.tables()
        yield self._table
        if self._places is not None:
            yield self._places

    def launch(self, gradients: Sequence[Tensor], found_inf: Tensor | None, hyperparameters: dict[str, Any]) -> None:
        """Update the weights in place, with the gradients of all slots, and what was found of them."""
        found_stride = 0 if found_inf is None else found_inf.dim()
        if self._indices is not None:
            gradients = [gradients[index] for index in self._indices]
            if found_inf is not None and found_stride:
                found_inf = found_inf[self._places]
        copies = {place: self._weights[place].contiguous() for place in self._scattered}
        if list(map(Tensor.stride, gradients)) != self._strides:
            gradients = [
                ordered_like(gradient, copies.get(place, weight))
                for place, (gradient, weight) in enumerate(zip(gradients, self._weights, strict=True))
            ]
        table = self._table
        if copies:
            rows = [
                (copies[place].data_ptr(), *row[1:]) if place in copies else row for place, row in enumerate(self._rows)
            ]
            table = _on_device([number for row in rows for number in row], table.device)
        tiles = self._tiles
        adamw_kernel[(tiles.count,)](
            table, tiles.addresses_of(gradients), tiles.owners, tiles.numbers, found_inf, found_stride,
            **hyperparameters, **self._options, **COMPILE_OPTIONS,
        )  # fmt: skip
        for place, copy in copies.items():
            self._weights[place].copy_(copy)
        # Autograd, and whoever keeps masters, notice writes by a tensor's version; a kernel's must be counted too.
        torch.autograd.graph.increment_version(self._weights)


def specialization(
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    master_weights: str,
    optimizer_state: str,
    *,
    amsgrad: bool = False,
    clip: bool = False,
    decoupled: bool = True,
    maximize: bool = False,
) -> dict[str, Any]:
    """What the update kernel is compiled for: its constant arguments."""
    master = ITSELF if dtype == torch.float32 else MASTER_FORMATS[master_weights]
    moment = MOMENT_FORMATS[optimizer_state]
    return {
        "HALF": TYPES[dtype],
        "GRADIENT": TYPES[gradient_dtype],
        "LOAD_MASTER": master.load,
        "STORE_MASTER": master.store,
        "LOAD_MOMENT": moment.load,
        "STORE_MOMENT": moment.store,
        "AMSGRAD": amsgrad,
        "CLIP": clip,
        "DECOUPLED": decoupled,
        "MAXIMIZE": maximize,
        "BLOCK": BLOCK,
        "TAIL": TAIL,
    }


def _row(slot: Slot) -> tuple[int, ...]:
    """A parameter's numbers in the update kernel's table."""
    moments = [number for stored in (slot.exp_avg, slot.exp_avg_sq, slot.max_exp_avg_sq) for number in _two(stored)]
    weight = slot.weight
    return (weight.data_ptr(), _address(slot.master), *moments, slot.step.data_ptr(), weight.numel())


def _two(stored: Moment | None) -> tuple[int, int]:
    return (0, 0) if stored is None else (stored.codes.data_ptr(), _address(stored.scales))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    return _to_device(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device: from pinned memory, which torch keeps until the copy is done."""
    if device.type == "cpu":
        return tensor
    if torch.cuda.is_current_stream_capturing():
        REPLAYED.append(tensor)  # pinning it might ask events, which no capture allows
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


def _number_or_tensor(name: str, value: float | Tensor) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {f"{name}_tensor": value, name: 0.0}
    return {f"{name}_tensor": None, name: float(value)}


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _by_dtype(gradients: Sequence[Tensor]) -> dict[torch.dtype, tuple[Sequence[Tensor], list[int] | None]]:
    """The gradients that have elements, by dtype, and which of all they are; None where they are all."""
    if all(map(Tensor.numel, gradients)) and len(set(map(DTYPE, gradients))) == 1:
        return {gradients[0].dtype: (gradients, None)}
    places: dict[torch.dtype, list[int]] = {}
    for place, gradient in enumerate(gradients):
        if gradient.numel():
            places.setdefault(gradient.dtype, []).append(place)
    return {dtype: ([gradients[place] for place in own], own) for dtype, own in places.items()}
