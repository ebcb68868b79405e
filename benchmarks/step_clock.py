"""How long a Trainer's steps take, told by a callback."""

import time
from typing import Any

import lightning as L
import torch


class StepClock(L.Callback):
    """Times the steps of a fit. On CUDA by events, so that nothing waits for the device while it trains."""

    def __init__(self) -> None:
        self._ends: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type != "cuda":
            self._ends.append(time.perf_counter())
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._ends.append(end)

    def seconds(self) -> list[float]:
        """Of every step but the first: from the end of the step before to its own."""
        pairs = list(zip(self._ends, self._ends[1:], strict=False))
        if pairs and isinstance(self._ends[0], torch.cuda.Event):
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]
