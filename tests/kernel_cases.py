"""What the kernels are tried on, on CPU tensors and on a GPU's: formats, sizes, and the slots of parameters."""

from typing import Any

import torch
from torch import Tensor

from lightning_mpt import pieces
from lightning_mpt.kernels.slots import Slot
from lightning_mpt.state import decoded as decoded_moment
from lightning_mpt.storage import (
    HALF_DTYPES,
    MASTER_STORAGES,
    MOMENT_STORAGES,
    MomentStorage,
    master_storage,
    moment_storage,
    zeros,
)

EXACT = moment_storage("float32")
FORMATS = [(masters, moments) for masters in MASTER_STORAGES for moments in MOMENT_STORAGES]
OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "maximize": False,
}  # fmt: skip
SIZES = [1, 127, 128, 129, 0, 300, 2048, 2049, 5000]
"""About the edges of a block of scales and of the Triton kernel's tiles."""


def slot_for(weight: Tensor, storage_name: str, amsgrad: bool, moment_storage: MomentStorage = EXACT) -> Slot:
    lies_like = pieces.dense(weight)
    moments = [zeros(moment_storage, lies_like, signed=index == 0) for index in range(3)]
    half = weight.dtype in HALF_DTYPES
    return Slot(
        weight=weight,
        master=master_storage(storage_name).of_half(lies_like) if half else None,
        exp_avg=moments[0],
        exp_avg_sq=moments[1],
        max_exp_avg_sq=moments[2] if amsgrad else None,
        step=torch.zeros(()),
    )


def decoded(slot: Slot, storage_name: str) -> Tensor:
    if slot.master is None:
        return slot.weight.clone()
    weight = pieces.dense(slot.weight)
    out, spare = torch.empty(2, weight.numel(), device=weight.device)
    flat = master_storage(storage_name).decode(pieces.flat(weight), pieces.flat(slot.master), out, spare)
    return flat.clone().as_strided(weight.shape, weight.stride())


def fp32_of(slot: Slot, masters: str, moments: str) -> list[Tensor]:
    """Master and moments of a flat slot, decoded."""
    storage = moment_storage(moments)
    decoded_moments = [
        decoded_moment(stored, name, storage)
        for stored, name in zip(slot.moments, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), strict=False)
    ]
    return [decoded(slot, masters), *decoded_moments]
