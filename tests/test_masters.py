"""One door to the masters: writes elsewhere are noticed, and writes that change nothing are not mistaken for them."""

import copy

import pytest
import torch
from torch import nn

from lightning_mpt.masters import MasterWeights
from lightning_mpt.storage import master_storage


def weight_and_value() -> tuple[nn.Parameter, torch.Tensor]:
    value = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(torch.empty(33, 7, dtype=torch.bfloat16)), value


@pytest.mark.parametrize("storage", ["split", "float32"])
def test_what_is_written_is_read_and_the_weight_is_its_rounding(storage: str) -> None:
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage(storage))
    assert torch.equal(masters.read(parameter), value)
    torch.testing.assert_close(parameter.float(), value, rtol=2**-8, atol=0)
    assert parameter in masters
    masters.drop(parameter)
    assert torch.equal(masters.read(parameter), parameter.float())


@pytest.mark.parametrize(("first", "then"), [("split", "float32"), ("float32", "split")])
def test_a_master_may_be_claimed_in_another_storage(first: str, then: str) -> None:
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage(first))
    assert masters.claim(parameter, master_storage(then)).dtype == master_storage(then).dtype
    assert torch.equal(masters.read(parameter), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", ["split", "split8", "float32"])
def test_what_somebody_else_writes_is_taken_over_where_it_changed_something(storage: str, dtype: torch.dtype) -> None:
    """Again and again; of a split master the first time is where it is noticed that somebody writes at all."""
    value = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(torch.empty(33, 7, dtype=dtype))
    masters = MasterWeights()
    for turn in range(3):
        masters.write(parameter, value.clone(), master_storage(storage))
        held = masters.read(parameter)
        with torch.no_grad():
            parameter.clamp_(-1.0, 1.0)
        changed = held.to(dtype).abs() > 1.0
        assert changed.any()
        kept = held if turn or storage == "float32" else parameter.detach().float()
        assert torch.equal(masters.read(parameter), torch.where(changed, held.sign(), kept))


@pytest.mark.parametrize("storage", ["split", "float32"])
def test_a_write_that_changes_nothing_leaves_the_master_as_it_is(storage: str) -> None:
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.claim(parameter, master_storage(storage))
    with torch.no_grad():
        parameter.zero_()
    masters.read(parameter)  # notices that somebody writes
    masters.write(parameter, value.clone(), master_storage(storage))
    for _ in range(3):
        with torch.no_grad():
            parameter.clamp_(-100.0, 100.0)
        assert torch.equal(masters.read(parameter), value)
        masters.claim(parameter, master_storage(storage))
        assert masters.untouched([parameter])


def test_a_write_through_data_reaches_a_plain_master() -> None:
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage("float32"))
    parameter.data.clamp_(-0.5, 0.5)
    expected = torch.where(value.abs() > parameter.detach().float().abs().max(), value.sign() * 0.5, value)
    torch.testing.assert_close(masters.read(parameter), expected, rtol=0, atol=2**-9)
    assert torch.equal(masters.read(parameter).bfloat16(), parameter.detach())


@pytest.mark.parametrize("storage", ["split", "split8"])
def test_zeros_written_through_data_are_zeros(storage: str) -> None:
    """A pruning mask; of a weight that was rounded up the correction is negative, and below the bits of 0 is NaN."""
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage(storage))
    parameter.data[::2] = 0.0
    parameter.data[1::4] = -0.0
    found = masters.read(parameter)
    assert found.isfinite().all()
    assert found[::2].abs().max() < 1e-38
    assert found[1::4].abs().max() < 1e-38


@pytest.mark.parametrize("storage", ["split", "float32"])
def test_masters_that_were_made_in_inference_mode_can_be_used_outside(storage: str) -> None:
    """As a checkpoint does that `trainer.validate` has loaded."""
    parameter, value = weight_and_value()
    masters = MasterWeights()
    with torch.inference_mode():
        masters.write(parameter, value.clone(), master_storage(storage))
    assert torch.equal(masters.read(parameter), value)
    masters.claim(parameter, master_storage(storage)).add_(0)
    masters.stepped([parameter])
    assert torch.equal(masters.read(parameter), value)


@pytest.mark.parametrize("storage", ["split", "float32"])
def test_a_copy_has_masters_of_its_own(storage: str) -> None:
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage(storage))
    other_parameter, other = copy.deepcopy((parameter, masters))
    with torch.no_grad():
        parameter.zero_()
    assert torch.equal(other.read(other_parameter), value)


def test_a_weight_that_is_not_dense_can_have_a_master() -> None:
    _, value = weight_and_value()
    parameter = nn.Parameter(torch.empty(33, 14, dtype=torch.bfloat16)[:, ::2])
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage("split"))
    assert torch.equal(masters.read(parameter), value)
