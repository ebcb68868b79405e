"""A device that runs out of memory, without one: for the tests of what is said then."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryLimit(TorchDispatchMode):
    """An operation after which more than `limit_bytes` of what was made within this is live raises CUDA's error."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.raised: torch.OutOfMemoryError | None = None
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._hold(args, counted=False)  # a view of what is older is no new memory
        result = func(*args, **(kwargs or {}))
        self._hold(result, counted=True)
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        if sum(size for _, size in self._live.values()) > self.limit_bytes and self.raised is None:
            self.raised = torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 "
                "GiB is free."
            )
            raise self.raised
        return result

    def _hold(self, tensors: Any, *, counted: bool) -> None:
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._live:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() if counted else 0)
