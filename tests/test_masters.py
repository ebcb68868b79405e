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


def test_a_write_that_changes_nothing_leaves_a_plain_master_as_it_is() -> None:
    parameter, value = weight_and_value()
    masters = MasterWeights()
    masters.write(parameter, value.clone(), master_storage("float32"))
    with torch.no_grad():
        parameter.copy_(parameter.detach().clone())
    assert torch.equal(masters.read(parameter), value)
    with torch.no_grad():
        parameter[0, 0] += 1.0
    assert torch.equal(masters.read(parameter), parameter.float())


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
