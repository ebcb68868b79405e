"""What a MasterAdamW saves: state for torch's AdamW, the masters, and to go on bit for bit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from stepping import HALVES, STORAGES, assert_same, parameters, snapshot, train
from torch import nn

from lightning_mpt import MasterAdamW
from lightning_mpt.storage import MOMENT_STORAGES


@pytest.mark.parametrize("target", STORAGES)
@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_loaded_optimizer_goes_on_bit_for_bit(dtype: torch.dtype, source: str, target: str) -> None:
    first = parameters(dtype)
    optimizer = MasterAdamW(first, lr=1e-2, master_weights=source)
    train(optimizer, first, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    second = parameters(dtype, seed=1)  # other weights: the masters in the file are what counts
    other = MasterAdamW(second, master_weights=target)
    other.load_state_dict(saved)
    assert {value.dtype for state in other.state.values() for value in state.values()} == {torch.float32}
    train(optimizer, first, range(5, 10))
    train(other, second, range(5, 10))
    if dtype == torch.float16 and source != target:
        # Below 2**-16 a split master keeps less than a plain one.
        torch.testing.assert_close(snapshot(other, second)[1], snapshot(optimizer, first)[1], rtol=0, atol=2.0**-39)
    else:
        assert_same(snapshot(other, second), snapshot(optimizer, first))


@pytest.mark.parametrize("optimizer_state", MOMENT_STORAGES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compact_state_is_saved_in_fp32_and_loaded_bit_for_bit(dtype: torch.dtype, optimizer_state: str) -> None:
    def make(params: Any) -> MasterAdamW:
        return MasterAdamW(params, lr=1e-2, amsgrad=True, master_weights="split8", optimizer_state=optimizer_state)

    first, second = parameters(dtype), parameters(dtype, seed=1)
    optimizer, other = make(first), make(second)
    train(optimizer, first, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"}
    assert {value.dtype for state in saved["state"].values() for value in state.values()} == {torch.float32}
    other.load_state_dict(saved)
    train(optimizer, first, range(5, 10))
    train(other, second, range(5, 10))
    assert_same(snapshot(other, second), snapshot(optimizer, first))
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert_same(pickled.state_dict()["state"], optimizer.state_dict()["state"])


def test_states_go_to_torchs_adamw_and_come_back() -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, lr=1e-2)
    train(optimizer, params, range(3))
    plain = torch.optim.AdamW([nn.Parameter(master.clone()) for master in optimizer.master_params()])
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 1e-2
    again = MasterAdamW(parameters(torch.bfloat16))
    again.load_state_dict(plain.state_dict())
    for ours, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["state"][0].pop("exp_avg"), r"parameter 0 has .* lacks \['exp_avg'\]: load a state_dict of AdamW"),
        (lambda s: s["state"][1].update(exp_avg_sq=torch.zeros(3)), r"exp_avg_sq of parameter 1 has shape \(3,\)"),
        (lambda s: s["state"][2].update(master=torch.zeros(2, 2)), r"master of parameter 2 has shape \(2, 2\)"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "different number of parameter groups"),
        (lambda s: s["param_groups"][0].pop("betas"), r"group 0 has .* lacks \['betas'\]: load a state_dict of AdamW"),
        (lambda s: s.pop("param_groups"), r"saved optimizer has \['state'\] and lacks \['param_groups'\]"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), r"parameter 0 has .* lacks \['max_exp_avg_sq'\]"),
    ],
    ids=["key", "shape", "master", "groups", "settings", "no groups", "amsgrad"],
)
def test_a_foreign_or_damaged_state_is_refused_and_nothing_changes(damage: Any, message: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, lr=1e-2)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_masters(copied: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, lr=1e-3)
    train(optimizer, params, range(5))
    other = copied(optimizer)
    assert_same(other.master_params(), optimizer.master_params())
    train(optimizer, params, range(5, 8))
    train(other, other.param_groups[0]["params"], range(5, 8))
    assert_same(other.master_params(), optimizer.master_params())


@pytest.mark.parametrize("storage", STORAGES)
def test_the_modules_weights_may_be_loaded_after_the_optimizers_state(storage: str) -> None:
    """They are the masters' rounding, and so change nothing."""
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, lr=1e-3, master_weights=storage)
    train(optimizer, params, range(5))
    weights, state = [param.detach().clone() for param in params], optimizer.state_dict()
    others = parameters(torch.bfloat16)
    other = MasterAdamW(others, lr=1e-3, master_weights=storage)
    other.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        for param, weight in zip(others, weights, strict=True):
            param.copy_(weight)
    assert_same(other.master_params(), optimizer.master_params())
    for _ in range(2):
        held = sum(stored.nbytes for _, stored in other.masters)
        train(other, others, range(5, 6))
        train(optimizer, params, range(5, 6))
    assert_same(other.master_params(), optimizer.master_params())
    assert held == sum(stored.nbytes for _, stored in optimizer.masters)
