"""Values saved for backward in two precisions: the commonest waste in mixed precision.

`x.float()` in a half module, an autocast that keeps a half copy of an FP32 weight: both copies stay until backward.
They are found by their values. Of every storage saved in a forward pass, and of every parameter, SAMPLES elements
evenly spaced in memory order make a fingerprint; a wide storage's, rounded to a narrower type, is looked up among the
fingerprints of that type and of the same number of elements; and what matches is compared in full, piece by piece. So
the work is linear in the number of tensors, and all fingerprints come to the host at once.

Memory order is what makes it simple: a copy in another type has the layout of the original, whatever views of the two
are saved.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from ..figures import Duplicate

SAMPLES = 64
"""Elements of a fingerprint. A storage of fewer is too small to matter, and is passed over."""
PIECE = 1 << 18
"""Elements compared at once, so that comparing takes half a MiB and no more."""
TRIES = 4
"""Wide storages that one narrow one is compared with in full, where several have its fingerprint."""

_WIDTHS = {torch.float64: 8, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


class _Candidate(NamedTuple):
    storage: StorageWeakRef
    elements: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    module: str


_Live = tuple[_Candidate, torch.Tensor]
"""A candidate, and its storage as a vector."""


class DuplicateFinder:
    """Collects storages in the order in which a forward pass saves them, and looks for equal values among them.

    Storages are held weakly: none lives longer for having been added.
    """

    def __init__(self) -> None:
        self._candidates: dict[int, _Candidate] = {}  # by the address of the storage object, held by the weak reference

    def add(self, tensor: torch.Tensor, module: str | None) -> None:
        """`tensor`, plain and strided, is a parameter of the module at path `module`, or saved while that ran."""
        width = _WIDTHS.get(tensor.dtype)
        if width is None:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._candidates or storage.nbytes() < SAMPLES * width or storage.nbytes() % width:
            return
        elements = storage.nbytes() // width
        self._candidates[storage._cdata] = _Candidate(
            StorageWeakRef(storage), elements, tensor.dtype, tuple(tensor.shape), module or ""
        )

    @torch.no_grad()
    def find(self) -> list[Duplicate]:
        """Every storage whose values a wider one has too, if both are alive; the later of the two names the module."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return []  # bringing values to the host would break the capture
        with _disable_current_modes():
            live = self._alive()
            return _match(live, _fingerprints([vector for _, vector in live])) if live else []

    def _alive(self) -> list[_Live]:
        """The candidates that still live and of whose number of elements there is more than one type."""
        dtypes: dict[int, set[torch.dtype]] = {}
        for candidate in self._candidates.values():
            dtypes.setdefault(candidate.elements, set()).add(candidate.dtype)
        live = []
        for candidate in self._candidates.values():
            if len(dtypes[candidate.elements]) > 1:
                storage = torch.UntypedStorage._new_with_weak_ptr(candidate.storage.cdata)
                if storage is not None:
                    vector = torch.empty(0, dtype=candidate.dtype, device=storage.device)
                    live.append((candidate, vector.set_(storage, 0, (candidate.elements,), (1,))))
        return live


def _fingerprints(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 [vectors, SAMPLES] on the host: elements of every vector, as far apart as can be.

    One transfer for all.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, vector in enumerate(vectors):
        by_dtype.setdefault(vector.dtype, []).append(index)
    rows = [
        torch.cat([vectors[index][:: len(vectors[index]) // SAMPLES][:SAMPLES] for index in indices]).double()
        for indices in by_dtype.values()
    ]
    order = torch.tensor([index for indices in by_dtype.values() for index in indices], device="cpu")
    return torch.empty(len(vectors), SAMPLES, dtype=torch.float64, device="cpu").index_copy_(
        0, order, torch.cat(rows).cpu().view(-1, SAMPLES)
    )


def _match(live: Sequence[_Live], fingerprints: torch.Tensor) -> list[Duplicate]:
    wide: dict[tuple[int, torch.dtype, tuple[float, ...]], list[int]] = {}
    for dtype in {candidate.dtype for candidate, _ in live}:
        for index, row in enumerate(fingerprints.to(dtype).double().tolist()):
            if _WIDTHS[live[index][0].dtype] > _WIDTHS[dtype] and min(row) < max(row):  # a constant tells nothing
                wide.setdefault((live[index][0].elements, dtype, tuple(row)), []).append(index)
    found = []
    for index, row in enumerate(fingerprints.tolist()):
        narrow, vector = live[index]
        for other in wide.get((narrow.elements, narrow.dtype, tuple(row)), [])[:TRIES]:
            if _same(live[other][1], vector):
                first, second = sorted((index, other))
                dtypes = (_name(live[other][0].dtype), _name(narrow.dtype))
                # A view saved later may be the transpose; the first copy's shape is the one that the user knows.
                found.append(Duplicate(live[second][0].module, live[first][0].shape, dtypes, vector.nbytes))
                break
    return found


def _same(wide: torch.Tensor, narrow: torch.Tensor) -> bool:
    return all(
        torch.equal(wide[at : at + PIECE].to(narrow.dtype), narrow[at : at + PIECE])
        for at in range(0, len(narrow), PIECE)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
