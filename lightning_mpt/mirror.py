"""A few numbers from the device to the host, without waiting for the device."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class _Copy(NamedTuple):
    numbers: Tensor
    arrived: torch.cuda.Event | None


class HostMirror:
    """Small tensors that are on their way to the host, in order.

    On CUDA they are copied into pinned memory while the device works on; `arrived` gives those that are there, so the
    host learns of a step some steps late. On a CPU they are there at once.
    """

    def __init__(self) -> None:
        self._on_the_way: deque[_Copy] = deque()

    def send(self, numbers: Tensor) -> None:
        """Start copying `numbers` (any dtype, one dimension)."""
        if numbers.device.type != "cuda":
            self._on_the_way.append(_Copy(numbers, None))
            return
        pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        pinned.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(numbers.device))
        self._on_the_way.append(_Copy(pinned, arrived))

    def arrived(self, *, wait: bool = False) -> list[list[float]]:
        """What has arrived since the last call, oldest first; with `wait`, all that was sent."""
        there = []
        while self._on_the_way:
            copy = self._on_the_way[0]
            if copy.arrived is not None:
                if wait:
                    copy.arrived.synchronize()
                elif not copy.arrived.query():
                    break
            there.append(copy.numbers.tolist())
            self._on_the_way.popleft()
        return there
