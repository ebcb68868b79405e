"""AdamW's state of one parameter: as it is stored while training, and in FP32, as torch.optim.AdamW saves it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .pieces import flat, ordered_like, piece_length, pieces
from .shards import local
from .storage import Moment, MomentStorage, zeros
from .storage.moments import blocks

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SCALE = "_scale"
"""Where codes have scales, they are beside them in the state: `exp_avg` and `exp_avg_scale`."""


def new_state(parameter: Tensor, weight: Tensor, storage: MomentStorage, *, amsgrad: bool) -> dict[str, Tensor]:
    """The state before the first step. `weight` is the parameter's dense form."""
    # The step is on the parameter's device, where the kernel reads it: no wait, and fit for a CUDA graph.
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    for name in MOMENTS if amsgrad else MOMENTS[:2]:
        put(state, name, zeros(storage, weight, signed=_signed(name)))
    return state


def moment(state: dict[str, Any], name: str, weight: Tensor, storage: MomentStorage) -> Moment:
    """A moment as it is stored, in the memory order of the dense `weight`. Changes the state to that where it is not.

    A state may hold FP32 moments of a file, or be ordered like a weight that has since changed its memory format.
    """
    stored = Moment(local(state[name]), state.get(name + SCALE))
    is_stored = stored.codes.dtype == storage.dtype(signed=_signed(name)) and (stored.scales is None) == (
        storage.block == 1
    )
    if is_stored and stored.codes is state[name] and ordered_like(stored.codes, weight) is stored.codes:
        return stored
    value = decoded(stored, name, storage) if is_stored else stored.codes
    stored = encoded(ordered_like(value, weight), name, storage)
    put(state, name, stored)
    return stored


def put(state: dict[str, Any], name: str, stored: Moment) -> None:
    """Write a moment into a state."""
    state[name] = stored.codes
    if stored.scales is not None:
        state[name + SCALE] = stored.scales


def to_fp32(state: dict[str, Any], storage: MomentStorage) -> dict[str, Any]:
    """The state as torch.optim.AdamW would hold it. Exact moments are the stored tensors, others new ones."""
    fp32 = {name: value for name, value in state.items() if not name.endswith(SCALE)}
    for name in MOMENTS:
        if name in fp32 and fp32[name].dtype == storage.dtype(signed=_signed(name)):
            fp32[name] = decoded(Moment(state[name], state.get(name + SCALE)), name, storage)
    return fp32


@torch.no_grad()
def encoded(value: Tensor, name: str, storage: MomentStorage) -> Moment:
    """Dense float32 values as the storage keeps them, rounded to nearest; an exact one keeps the tensor itself."""
    if storage.exact:
        return Moment(value)
    stored = zeros(storage, value, signed=_signed(name))

    def encode(codes: Moment, values: Tensor, scratch: list[Tensor]) -> None:
        storage.encode(values, codes, scratch, None, signed=_signed(name))

    _by_pieces(value, stored, storage, encode, write=stored.codes)
    return stored


@torch.no_grad()
def decoded(stored: Moment, name: str, storage: MomentStorage) -> Tensor:
    """The values of stored codes, float32, in their shape and order; of an exact storage the codes themselves."""
    if storage.exact:
        return stored.codes
    value = torch.empty_like(stored.codes, dtype=torch.float32)

    def decode(codes: Moment, values: Tensor, scratch: list[Tensor]) -> None:
        storage.decode(codes, values, signed=_signed(name))

    _by_pieces(value, stored, storage, decode, write=value)
    return value


def _by_pieces(
    value: Tensor,
    stored: Moment,
    storage: MomentStorage,
    work: Callable[[Moment, Tensor, list[Tensor]], None],
    write: Tensor,
) -> None:
    """Do the work on piece after piece, each filled up to whole blocks, and keep what it came to in `write`."""
    length = piece_length([value], 2 + storage.scratch_rows, storage.block)
    values, *scratch = torch.empty(1 + storage.scratch_rows, length, dtype=torch.float32, device=value.device)
    codes = stored.codes.new_zeros(length)
    for part in pieces(value.numel(), length):
        size = part.stop - part.start
        values[size:].zero_()
        codes[size:].zero_()
        values[:size].copy_(flat(value)[part])
        codes[:size].copy_(flat(stored.codes)[part])
        filled = blocks(size, storage.block) * storage.block
        scales = stored.scales
        if scales is not None:
            scales = scales[part.start // storage.block : blocks(part.stop, storage.block)]
        work(Moment(codes[:filled], scales), values[:filled], [row[:filled] for row in scratch])
        flat(write)[part].copy_((values if write is value else codes)[:size])


def check_saved(state_dict: dict[str, Any]) -> None:
    """ValueError if this is no state_dict of AdamW's, its parameters' states apart."""
    _check_keys("The saved optimizer", state_dict, ("state", "param_groups"))
    for index, group in enumerate(state_dict["param_groups"]):
        _check_keys(f"The saved group {index}", group, ("params", "lr", "betas", "eps", "weight_decay"))


def checked_state(state: dict[str, Any], parameter: Tensor, saved_id: Any, *, amsgrad: bool) -> dict[str, Any]:
    """A shallow copy of one parameter's saved state; ValueError if it is not AdamW's or does not fit."""
    if set(state) != {"master"}:
        moments = MOMENTS if amsgrad else MOMENTS[:2]
        _check_keys(f"The saved state of parameter {saved_id!r}", state, ("step", *moments))
    for name in (*MOMENTS, "master"):
        if name in state and state[name].shape != parameter.shape:
            raise ValueError(
                f"The saved {name} of parameter {saved_id!r} has shape {tuple(state[name].shape)} and the parameter "
                f"{tuple(parameter.shape)}: load the state of the same model."
            )
        if name in state and local(state[name]).isnan().any():
            raise ValueError(
                f"The saved {name} of parameter {saved_id!r} holds NaN, which the first step would spread to the "
                "weight: load an earlier checkpoint."
            )
    return dict(state)


def _check_keys(what: str, saved: dict[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in saved]
    if missing:
        raise ValueError(
            f"{what} has {sorted(saved)} and lacks {missing}: load a state_dict of AdamW, Adam or MasterAdamW."
        )


def _signed(name: str) -> bool:
    return name == MOMENTS[0]
