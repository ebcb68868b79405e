"""`lightning-mpt estimate`: the table of `lightning-mpt compare` without running on a device."""

from typing import Any
from ..precisions import trainer_arguments
from ..profiler import MemoryReport
from ..profiler.estimate import Trial


def estimate(trial: Trial, precision: str, *, device: str = "cuda", batch_size: int | None = None) -> MemoryReport:
    return trial.run(lambda: trainer_arguments(precision), batch_size=batch_size)
