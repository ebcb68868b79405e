"""What is usually said of FP32 training, held against reports made by hand."""

from dataclasses import replace

import pytest

from lightning_mpt.profiler import Category, MemoryReport, PhasePeak
from lightning_mpt.profiler.show.claims import left_out, peak_phase, saved_claims, share_claims


def report(peak_in: str = "backward", *, gradients_elsewhere: int = 0, **categories: int) -> MemoryReport:
    """A report with these bytes at its peak, which falls in the phase `peak_in`."""
    sizes = {Category(name): size for name, size in categories.items()}
    peak = sum(sizes.values())
    phases = {name: PhasePeak(peak // 2, {}) for name in ("forward", "backward", "optimizer_step")}
    phases["optimizer_step"] = PhasePeak(peak // 2, {Category.GRADIENTS: gradients_elsewhere})
    phases[peak_in] = PhasePeak(peak, sizes)
    return MemoryReport("cpu", peak, None, sizes, phases, {}, (), (), (), parameters=100, steps=1)


AS_SAID = report(weights=100, gradients=200, activations=700)


def test_where_all_is_as_said_there_is_nothing_to_explain() -> None:
    claims = share_claims(AS_SAID)
    assert [(claim.about, claim.share, claim.holds, claim.why) for claim in claims] == [
        ("activations", 0.7, True, ""),
        ("gradients", 0.2, True, ""),
        ("weights", 0.1, True, ""),
    ]
    assert left_out(AS_SAID) is None
    assert peak_phase(AS_SAID) == "backward"


def test_a_small_batch_lets_the_parameters_rule() -> None:
    base = report("optimizer_step", weights=400, gradients=400, optimizer_state=800, activations=100)
    activations, gradients, weights = share_claims(base)
    assert not any(claim.holds for claim in (activations, weights))
    assert activations.why == "weights, gradients and optimizer state are 94% of it; a larger batch would shift that"
    assert weights.why == "activations are only 6%, so that what grows with the parameters rules"
    assert gradients.holds
    assert left_out(base) == ("optimizer state", pytest.approx(800 / 1700))
    assert left_out(replace(base, optimizers=("AdamW",))) == ("AdamW's state", pytest.approx(800 / 1700))


def test_a_peak_before_the_gradients_are_there_is_said_so() -> None:
    base = report("backward", gradients_elsewhere=100, weights=100, optimizer_state=200, activations=1200)
    activations, gradients, weights = share_claims(base)
    assert activations.why == ""
    assert gradients.why == "the peak falls in backward, when few of them are there; all of them would be 7%"
    assert weights.holds


def test_a_large_batch_leaves_little_for_the_parameters() -> None:
    base = report(weights=10, gradients=10, activations=980)
    activations, gradients, weights = share_claims(base)
    assert activations.why == "the batch is large for this number of parameters"
    assert gradients.why == weights.why
    assert weights.why == "activations and temporaries are 98%: the batch is large for this number of parameters"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (
            report(weights=200, gradients=200, master_weights=200, optimizer_state=800, activations=200),
            "moments stay at 40% of the FP32 peak",
        ),
        (
            report(weights=200, gradients=200, master_weights=200, optimizer_state=600, activations=200),
            "weights with their masters stay at 20% of the FP32 peak",
        ),
        (report(weights=400, gradients=400, optimizer_state=200), ""),
        (report(activations=1800), "activations go from 20% to 90% of the FP32 peak"),
        (
            report(weights=100, gradients=200, master_weights=100, optimizer_state=100, activations=200),
            "moments go from 40% to 5% of the FP32 peak",
        ),
    ],
    ids=["moments stay", "masters stay", "half", "activations grow", "more than half"],
)
def test_half_saved_or_why_not(other: MemoryReport, why: str) -> None:
    base = report(weights=400, gradients=400, optimizer_state=800, activations=400)
    (claim,) = saved_claims(base, other)
    assert claim.share == pytest.approx((2000 - other.peak_bytes) / 2000)
    assert claim.holds == (why == "")
    assert claim.why == why


def test_temporaries_that_rule_are_named() -> None:
    activations, gradients, _ = share_claims(report(weights=100, gradients=100, temporaries=600, activations=200))
    assert activations.why == "temporaries, born and gone within a phase, are 60% of it"
    assert gradients.why == "activations and temporaries are 80%: the batch is large for this number of parameters"


def test_a_report_of_nothing_says_nothing() -> None:
    assert share_claims(report()) == []
    assert saved_claims(report(), AS_SAID) == []
