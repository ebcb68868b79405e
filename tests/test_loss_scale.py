"""The rule of the loss scale, against GradScaler and against the rule written out in plain Python."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mpt import ConstantLossScale, DynamicLossScale
from lightning_mpt.loss_scale import make_loss_scale

overflow_patterns = st.lists(st.booleans(), min_size=1, max_size=60)


def run(scale: DynamicLossScale | ConstantLossScale, overflows: list[bool]) -> list[float]:
    scales = []
    for overflow in overflows:
        scale.update(torch.tensor(float(overflow)))
        scales.append(scale.scale.item())
    return scales


@settings(max_examples=200, deadline=None)
@given(
    overflows=overflow_patterns,
    interval=st.integers(1, 5),
    init=st.sampled_from([1.0, 3.0, 2.0**15, 2.0**126]),
    growth=st.sampled_from([1.5, 2.0, 16.0]),
    backoff=st.sampled_from([0.25, 0.5, 0.9]),
)
def test_with_hysteresis_1_the_scales_are_gradscalers(
    overflows: list[bool], interval: int, init: float, growth: float, backoff: float
) -> None:
    ours = DynamicLossScale(init, growth, backoff, interval, min_scale=1e-37)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=init, growth_factor=growth, backoff_factor=backoff, growth_interval=interval
    )
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = []
    for overflow in overflows:
        scaler.scale(weight.sum())  # makes its tensors
        weight.grad = torch.tensor([float("inf") if overflow else 1.0])
        scaler.step(optimizer)
        scaler.update()
        theirs.append(scaler.get_scale())
    assert run(ours, overflows) == theirs


@settings(max_examples=200, deadline=None)
@given(
    overflows=overflow_patterns,
    interval=st.integers(1, 5),
    hysteresis=st.integers(1, 4),
    min_scale=st.sampled_from([1.0, 64.0, 1000.0]),
)
def test_hysteresis_and_the_floor_follow_their_rule(
    overflows: list[bool], interval: int, hysteresis: int, min_scale: float
) -> None:
    scale, clean, since_growth, expected = 1024.0, 0, 0, []
    for overflow in overflows:
        if overflow:
            clean, since_growth = 0, since_growth + 1
            if since_growth >= hysteresis:
                scale = max(min_scale, scale / 2)
        else:
            clean += 1
            if clean == interval:
                scale, clean, since_growth = scale * 2, 0, 0
        expected.append(scale)
    ours = DynamicLossScale(1024.0, growth_interval=interval, hysteresis=hysteresis, min_scale=min_scale)
    assert run(ours, overflows) == expected


@given(overflows=overflow_patterns, cut=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_a_restored_scale_goes_on_as_if_never_stopped(overflows: list[bool], cut: int) -> None:
    def fresh() -> DynamicLossScale:
        return DynamicLossScale(1024.0, growth_interval=3, hysteresis=2)

    whole, first, second = fresh(), fresh(), fresh()
    scales = run(whole, overflows)
    run(first, overflows[:cut])
    second.load_state_dict(first.state_dict())
    assert run(second, overflows[cut:]) == scales[cut:]
    assert second.state_dict() == whole.state_dict()


def test_growth_stops_before_infinity() -> None:
    scale = DynamicLossScale(2.0**127, growth_interval=1)
    assert run(scale, [False, False]) == [2.0**127, 2.0**127]


def test_at_minimum_says_that_an_overflow_can_lower_nothing() -> None:
    scale = DynamicLossScale(4.0, min_scale=2.0)
    assert not scale.at_minimum
    run(scale, [True])
    assert scale.at_minimum
    assert ConstantLossScale(8.0).at_minimum


def test_a_constant_never_changes() -> None:
    scale = ConstantLossScale(100)
    assert run(scale, [True, False, True]) == [100.0] * 3
    scale.load_state_dict({"scale": 5.0, "growth_tracker": 0, "overflows_left": 1})
    assert scale.scale.item() == 100.0
    assert scale.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0}, r"init_scale=0 must be a positive finite number"),
        ({"init_scale": float("nan")}, r"init_scale=nan must be"),
        ({"init_scale": float("inf")}, r"init_scale=inf must be"),
        ({"init_scale": "big"}, r"init_scale='big' must be"),
        ({"init_scale": 0.5}, r"init_scale=0.5 must be at least min_scale=1.0"),
        ({"growth_factor": 1.0}, r"growth_factor=1.0 must be a finite number above 1"),
        ({"backoff_factor": 1.0}, r"backoff_factor=1.0 must lie between 0 and 1"),
        ({"backoff_factor": -0.5}, r"backoff_factor=-0.5 must lie"),
        ({"growth_interval": 0}, r"growth_interval=0 must be a whole number of at least 1"),
        ({"growth_interval": 2.5}, r"growth_interval=2.5 must be a whole number"),
        ({"hysteresis": True}, r"hysteresis=True must be a whole number"),
        ({"init_scale": 1e39}, r"init_scale=1e\+39 must be a positive finite number that float32 holds"),
        ({"min_scale": -1.0}, r"min_scale=-1.0 must be a positive"),
        ({"min_scale": 1e-46}, r"min_scale=1e-46 must be a positive"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_numbers_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**arguments)


@pytest.mark.parametrize("scale", [0, -1.0, 1e39, 1e-46, float("nan"), float("inf"), "8", None, True])
def test_a_constant_must_be_positive_and_finite(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"scale=.* must be a positive finite number"):
        ConstantLossScale(scale)


def test_what_a_users_argument_means() -> None:
    half, brain = torch.float16, torch.bfloat16
    assert isinstance(make_loss_scale("auto", half), DynamicLossScale)
    assert isinstance(make_loss_scale("dynamic", brain), DynamicLossScale)
    for argument, dtype, scale in (("auto", brain, 1.0), (None, half, 1.0), (128, half, 128.0), (0.5, brain, 0.5)):
        made = make_loss_scale(argument, dtype)
        assert isinstance(made, ConstantLossScale)
        assert made.scale.item() == scale
    mine = DynamicLossScale(64.0)
    assert make_loss_scale(mine, half) is mine


@pytest.mark.parametrize("argument", [0, -1, float("nan"), float("inf"), "x", True, [], {}])
def test_what_is_no_loss_scale_is_refused(argument: Any) -> None:
    with pytest.raises(ValueError, match=r"loss_scale=.* is not a loss scale: use 'auto', 'dynamic', None"):
        make_loss_scale(argument, torch.float16)


def test_the_defaults_are_the_documented_ones() -> None:
    assert repr(DynamicLossScale()) == (
        "DynamicLossScale(init_scale=32768.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, "
        "hysteresis=1, min_scale=1.0)"
    )
