"""Schedules hold back one call for every step that was skipped."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

from lightning_mpt.schedules import HeldSchedules


def schedule() -> tuple[torch.optim.SGD, LinearLR]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, LinearLR(optimizer, 1.0, 0.0, total_iters=100)


@pytest.mark.parametrize(("frequency", "advances"), [(1, 7), (2, 9), (3, 9), (4, 10)])
def test_it_owes_a_call_for_so_many_skipped_steps(frequency: int, advances: int) -> None:
    optimizer, scheduler = schedule()
    held = HeldSchedules()
    held.hold(scheduler, frequency)
    for _ in range(3):
        held.skipped(optimizer)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == advances


def test_only_the_schedule_of_the_optimizer_that_skipped_waits() -> None:
    pairs = [schedule(), schedule()]
    held = HeldSchedules()
    for _, scheduler in pairs:
        held.hold(scheduler, 1)
    held.skipped(pairs[0][0])
    for optimizer, scheduler in pairs:
        optimizer.step()
        scheduler.step()
    assert [scheduler.last_epoch for _, scheduler in pairs] == [0, 1]


def test_it_stays_the_same_object_and_is_saved_as_ever() -> None:
    optimizer, scheduler = schedule()
    keys = set(scheduler.state_dict())
    held = HeldSchedules()
    held.hold(scheduler, 1)
    assert isinstance(scheduler, LinearLR)
    assert set(scheduler.state_dict()) == keys
    held.skipped(optimizer)
    held.release()
    assert type(scheduler) is LinearLR
    optimizer.step()
    scheduler.step()
    assert scheduler.last_epoch == 1


def test_a_schedule_of_schedules_waits_as_a_whole() -> None:
    optimizer, first = schedule()
    scheduler = SequentialLR(optimizer, [first, ConstantLR(optimizer, 0.5)], milestones=[2])
    held = HeldSchedules()
    held.hold(scheduler, 1)
    held.skipped(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 2


@pytest.mark.filterwarnings("ignore:.*optimizer.step.*:UserWarning")  # what torch advises is not the matter here
def test_what_is_owed_is_saved_and_goes_on_elsewhere() -> None:
    """Also after release, as in a file that is saved after training; and a copy of a schedule owes nothing."""
    held, again = HeldSchedules(), HeldSchedules()
    optimizer, scheduler = schedule()
    held.hold(scheduler, 1)
    held.skipped(optimizer)
    copied = copy.deepcopy(scheduler)
    held.release()
    assert held.state_dict() == [1]
    _, resumed = schedule()
    again.hold(resumed, 1)
    again.load_state_dict(held.state_dict())
    for one in (resumed, copied):
        one.step()
    assert [one.last_epoch for one in (resumed, copied)] == [0, 1]
    again.load_state_dict([])  # of a run without schedules
    assert again.state_dict() == [0]
