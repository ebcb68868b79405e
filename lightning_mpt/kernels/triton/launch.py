"""From parameters to one launch: tables of addresses, kept from step to step, and the kernel's options."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...pieces import dense, ordered_like
from ...storage import MasterStorage, Moment, MomentStorage
from ..slots import GradientTransform, Slot
from .formats import ITSELF, MASTER_FORMATS, MOMENT_FORMATS
from .scan import scan_kernel
from .update import adamw_kernel

BLOCK = 2048
"""Elements that a program of the update works on: 16 for each of its 128 threads, 16 bytes of the smallest codes."""
TAIL = 256
SCAN_BLOCK = 8192
KEPT_BYTES = 2**26
"""Tables of parameters that are not updated any more go once all are larger than this."""
KEPT_TABLES = 8
"""But not the newest."""
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
COMPILE_OPTIONS = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": False}
"""128 registers for 128 threads: four programs at least share a multiprocessor, and nothing spills. Without fused
multiply-adds, which the compiler would place differently around each format, all formats compute alike: `split` and
`float32` masters stay equal bit for bit."""


class TritonKernel:
    """The kernels for one optimizer's tensors on one device. See `kernels/reference.py` for what is what."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, tuple[Any, ...]] = {}
        """Tensors first, then what must live as long as they."""

    def tables(self) -> Iterator[Tensor]:
        """What is kept on the device from step to step."""
        return (item for entry in self._tables.values() for item in entry if isinstance(item, Tensor))

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
        """One launch for all slots whose weights share a dtype, as do their gradients."""
        multiplier, clip_value = transform
        hyperparameters = {
            "found_inf": found_inf,
            **_number_or_tensor("multiplier", multiplier),
            **_number_or_tensor("lr", lr),
            "one_minus_beta1": 1.0 - betas[0],
            "beta2": float(betas[1]),
            "one_minus_beta2": 1.0 - betas[1],
            "log_beta1": _log(betas[0]),
            "log_beta2": _log(betas[1]),
            "eps": float(eps),
            "weight_decay": float(weight_decay),
            "clip_value": 0.0 if clip_value is None else float(clip_value),
        }
        pairs = [pair for pair in zip(slots, gradients, strict=True) if pair[1].numel()]
        for (dtype, gradient_dtype), alike in groupby(sorted(pairs, key=_dtypes_name), key=_dtypes):
            some_slots, some_gradients = (list(column) for column in zip(*alike, strict=True))
            options = specialization(
                dtype,
                gradient_dtype,
                storage.name,
                moments.name,
                amsgrad=some_slots[0].max_exp_avg_sq is not None,
                clip=clip_value is not None,
                decoupled=decoupled,
                maximize=maximize,
            )
            # A weight that is not dense is updated as a dense copy; so is a gradient that lies otherwise.
            weights = [dense(slot.weight) for slot in some_slots]
            ordered = [ordered_like(g, weight) for g, weight in zip(some_gradients, weights, strict=True)]
            device = weights[0].device
            key = ("slots", *map(id, some_slots), *(weight.data_ptr() for weight in weights))
            table, _ = self._kept(key, partial(_slot_table, some_slots, weights))
            addresses = self._addresses(("gradients", *key), ordered)
            owners, numbers = self._tiles([weight.numel() for weight in weights], BLOCK, device)
            adamw_kernel[(len(owners),)](
                table, addresses, owners, numbers, **hyperparameters, **options, **COMPILE_OPTIONS
            )
            for slot, weight in zip(some_slots, weights, strict=True):
                if weight is not slot.weight:
                    slot.weight.copy_(weight)
            # Autograd, and whoever keeps masters, notice writes by a tensor's version; a kernel's must be counted too.
            torch.autograd.graph.increment_version([slot.weight for slot in some_slots])

    def scan_gradients(self, gradients: Sequence[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]:
        """One read of all gradients. As `scan_gradients` of the reference."""
        squares: list[Tensor] = []
        flags: list[Tensor] = []
        filled = [dense(gradient) for gradient in gradients if gradient.numel()]
        for dtype, alike in groupby(sorted(filled, key=_dtype_name), key=lambda gradient: gradient.dtype):
            some = list(alike)
            device = some[0].device
            sizes = tuple(gradient.numel() for gradient in some)
            (size_table,) = self._kept(("sizes", *sizes), lambda: (_on_device(sizes, device),))  # noqa: B023
            owners, numbers = self._tiles(sizes, SCAN_BLOCK, device)
            square, flag = torch.empty(2, len(owners), dtype=torch.float32, device=device)
            scan_kernel[(len(owners),)](
                self._addresses(("scanned", *sizes), some), size_table, owners, numbers, square, flag,
                GRADIENT=TYPES[dtype], BLOCK=SCAN_BLOCK, **COMPILE_OPTIONS,
            )  # fmt: skip
            squares.append(square)
            flags.append(flag)
        if not filled:
            zero = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
            return zero, zero if norm else None
        found_inf = torch.cat(flags).amax()
        return found_inf, torch.cat(squares).sum().sqrt() if norm else None

    def _addresses(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensor:
        """A table of where the tensors are. Gradients often lie where they lay a step ago, and it is still right."""
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        kept = self._tables.get(key)
        if kept is None or kept[1] != addresses:
            self._keep(key, (_on_device(addresses, tensors[0].device), addresses))
        table: Tensor = self._tables[key][0]
        return table

    def _tiles(self, sizes: Sequence[int], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For every program: which tensor it works on, and which tile of it. Two of int32."""

        def make() -> tuple[Tensor, Tensor]:
            counts = torch.tensor([-(-size // block) for size in sizes])
            owners = torch.arange(len(sizes)).repeat_interleave(counts)
            firsts = (counts.cumsum(0) - counts)[owners]
            numbers = torch.arange(len(owners)) - firsts
            return _to_device(owners.int(), device), _to_device(numbers.int(), device)

        owners, numbers = self._kept(("tiles", block, *sizes), make)
        return owners, numbers

    def _kept(self, key: Hashable, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What `make` gives, made once. What the key's ids stand for must be in it, so that they stay theirs."""
        if key not in self._tables:
            self._keep(key, make())
        return self._tables[key]

    def _keep(self, key: Hashable, entry: tuple[Any, ...]) -> None:
        self._tables.pop(key, None)
        self._tables[key] = entry
        held = sum(table.nbytes for table in self.tables()) if len(self._tables) % KEPT_TABLES == 0 else 0
        while held > KEPT_BYTES and len(self._tables) > KEPT_TABLES:
            oldest = self._tables.pop(next(iter(self._tables)))
            held -= sum(item.nbytes for item in oldest if isinstance(item, Tensor))


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


def _slot_table(slots: Sequence[Slot], weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Slot]]:
    """The table of the update kernel; and the slots, to be kept with it."""
    rows = []
    for slot, weight in zip(slots, weights, strict=True):
        moments = [number for stored in (slot.exp_avg, slot.exp_avg_sq, slot.max_exp_avg_sq) for number in _two(stored)]
        rows += [weight.data_ptr(), _address(slot.master), *moments, slot.step.data_ptr(), weight.numel()]
    return _on_device(rows, weights[0].device), slots


def _two(stored: Moment | None) -> tuple[int, int]:
    return (0, 0) if stored is None else (stored.codes.data_ptr(), _address(stored.scales))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    return _to_device(torch.tensor(numbers, dtype=torch.int64), device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device: from pinned memory, which torch keeps until the copy is done."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _number_or_tensor(name: str, value: float | Tensor) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {f"{name}_tensor": value, name: 0.0}
    return {f"{name}_tensor": None, name: float(value)}


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _dtypes(pair: tuple[Slot, Tensor]) -> tuple[torch.dtype, torch.dtype]:
    return pair[0].weight.dtype, pair[1].dtype


def _dtypes_name(pair: tuple[Slot, Tensor]) -> str:
    return str(_dtypes(pair))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype)
