"""What a training step would need, told without a device: the real loops on tensors that have no memory.

    Trial(MyModule, my_data).run(lambda: {"precision": "bf16-mixed"}).print()

`memory.py` tells of storages as an allocator does, `trial.py` runs the Trainer, and session, owners, ledger and report
are those of a recording on a device: what is proven of these holds here. `corrections.py` is what CUDA does otherwise.
"""

from .batch import largest_batch
from .devices import CPU, CUDA, Device
from .ranks import PerRank, per_rank
from .trial import NEEDS_VALUES, EstimateError, Trial

__all__ = ["CPU", "CUDA", "NEEDS_VALUES", "Device", "EstimateError", "PerRank", "Trial", "largest_batch", "per_rank"]
