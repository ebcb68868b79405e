"""What the host knows of skipped steps: how many, how many in a row, and which schedules must wait for them.

The device decides whether a step is skipped, and the host is not made to wait for it: the few numbers that it needs are
copied into pinned memory while the device works on, and read when they have arrived. On CUDA that may be a step late;
on a CPU it is at once.
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Outcome(NamedTuple):
    numbers: Tensor
    """found_inf, whether the scale could fall no further, and the scale after the step."""
    optimizer: Optimizer
    arrived: torch.cuda.Event | None


class SkippedSteps:
    """Counts steps that were skipped.

    Args:
        scale: the loss scale before the first step.
        on_skip: is called with the optimizer of each skipped step.

    Attributes:
        total: steps skipped so far.
        scale: the loss scale after the last step that is known of.
    """

    def __init__(self, scale: float, on_skip: Callable[[Optimizer], None]) -> None:
        self.total = 0
        self.begin(scale)
        self._on_skip = on_skip
        self._on_the_way: deque[_Outcome] = deque()

    def begin(self, scale: float) -> None:
        """Training starts, at this loss scale: what was in a row is so no longer. The total goes on."""
        self.scale = scale
        self._in_a_row: Counter[int] = Counter()
        self._stuck: Counter[int] = Counter()

    @property
    def in_a_row(self) -> int:
        """Steps that an optimizer skipped since its last that was not; of several, the one with the most."""
        return max(self._in_a_row.values(), default=0)

    @property
    def stuck(self) -> int:
        """The same, since the loss scale could fall no further."""
        return max(self._stuck.values(), default=0)

    def record(self, found_inf: Tensor, at_minimum: Tensor, scale: Tensor, optimizer: Optimizer) -> None:
        """Start telling the host of a step. The tensors have no dimensions and share a device."""
        numbers = torch.stack([found_inf, at_minimum.to(found_inf.dtype), scale])
        if numbers.device.type != "cuda":
            self._on_the_way.append(_Outcome(numbers, optimizer, None))
            return
        pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        pinned.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(numbers.device))
        self._on_the_way.append(_Outcome(pinned, optimizer, arrived))

    def learn(self, *, wait: bool = False) -> None:
        """Take note of the steps whose numbers have arrived; with `wait`, of all."""
        while self._on_the_way:
            numbers, optimizer, arrived = self._on_the_way[0]
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():
                    return
            self._on_the_way.popleft()
            found_inf, at_minimum, self.scale = numbers.tolist()
            whose = id(optimizer)
            if found_inf:
                self.total += 1
                self._in_a_row[whose] += 1
                self._stuck[whose] = self._stuck[whose] + 1 if at_minimum else 0
                self._on_skip(optimizer)
            else:
                self._in_a_row[whose] = self._stuck[whose] = 0
