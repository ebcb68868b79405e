"""The histogram of gradients' exponents: counted as arithmetic says, true in every precision, and seen by no weight."""

import csv
import io
import math
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from rich.console import Console
from torch import Tensor, nn
from training import Classifier, adamw, classification, fit, mlp

from lightning_mpt import ConstantLossScale, DynamicLossScale, GradientHistogram, MasterWeightPrecision
from lightning_mpt.exponents import HIGHEST, LOWEST, ExponentCounter, ExponentHistogram
from lightning_mpt.gradient_tables import print_histograms, write_histogram_plot

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
DISTANCE = 0.03
"""Of two histograms: the share of values that is in another bin. The worst seen is 0.016 between bf16 and FP32, 0.005
between fp16 and FP32; gradients that were counted still scaled would be near 1."""


def awkward(dtype: torch.dtype) -> Tensor:
    """Values all over the range of `dtype`: zeros, subnormals, powers of two and their neighbours, inf and NaN."""
    generator = torch.Generator().manual_seed(0)
    information = torch.finfo(dtype)
    lowest, highest = math.log2(information.smallest_normal) - 30, math.log2(information.max)
    exponents = torch.rand(700, generator=generator, dtype=torch.float64) * (highest - lowest) + lowest
    signs = torch.randint(0, 2, (700,), generator=generator).double() * 2 - 1
    spread = (signs * exponents.exp2()).to(dtype)
    powers = torch.tensor([2.0**e for e in range(-149, 128)], dtype=torch.float64).to(dtype)
    neighbours = [powers, powers * (1 + information.eps), powers * (1 - information.eps)]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, information.max, information.tiny], dtype=dtype)
    return torch.cat([spread, *neighbours, special])


def exponent_of(value: float, scale: float) -> int | str:
    """floor(log2(|value / scale|)) in whole numbers, as no float can get wrong."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "zero"
    quotient = abs(Fraction(value) / Fraction(scale))
    exponent = quotient.numerator.bit_length() - quotient.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > quotient
    return min(max(exponent, LOWEST), HIGHEST)


def as_counter(histogram: ExponentHistogram) -> Counter[int | str]:
    bins: Counter[int | str] = Counter({LOWEST + index: count for index, count in enumerate(histogram.counts)})
    bins["zero"], bins["not finite"] = histogram.zeros, histogram.not_finite
    return +bins


def count(values: Tensor, scale: float | None = None) -> ExponentHistogram:
    counter = ExponentCounter(values.device)
    counter.add(values, None if scale is None else torch.tensor(scale))
    return counter.read()


# -- counting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("scale", [None, 1.0, 2.0**15, 2.0**-3, 1000.0, 0.3])
def test_counts_are_those_of_exact_arithmetic(dtype: torch.dtype, scale: float | None) -> None:
    values = awkward(dtype)
    exact = float(torch.tensor(scale or 1.0))  # what a float32 makes of the scale
    expected = Counter(exponent_of(value, exact) for value in values.tolist())
    assert as_counter(count(values, scale)) == expected


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_counts_are_those_of_numpy(dtype: torch.dtype) -> None:
    values = awkward(dtype)
    wide = values.double().numpy()
    finite = wide[np.isfinite(wide) & (wide != 0)]
    exponents, counts = np.unique(np.frexp(finite)[1] - 1, return_counts=True)
    histogram = count(values)
    assert {LOWEST + i: c for i, c in enumerate(histogram.counts) if c} == dict(
        zip(exponents.tolist(), counts.tolist(), strict=True)
    )
    assert histogram.zeros == (wide == 0).sum()
    assert histogram.largest == np.abs(finite).max()


def test_a_tensor_of_any_layout_is_counted_whole_and_unchanged() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1300, 801)
    before = matrix.clone()
    assert count(matrix) == count(matrix.t()) == count(matrix.to_sparse())
    assert count(matrix).total == matrix.numel()
    assert count(torch.empty(0)).total == 0
    assert torch.equal(matrix, before)


def test_counting_asks_no_value_of_the_device() -> None:
    """A tensor on `meta` has no values: whatever waited for one would raise."""
    counter = ExponentCounter(torch.device("meta"))
    counter.add(torch.empty(100, device="meta", dtype=torch.float16), torch.ones((), device="meta"))
    assert counter.counts.device.type == "meta"


# -- what the counts say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 8.0, 2.0**15, 2.0**-4, 2.0**40])
def test_shares_are_those_of_the_scaled_values_themselves(scale: float) -> None:
    values = awkward(torch.float32)
    scaled = values.double().abs() * scale
    number, finite = len(values), scaled.isfinite()
    shares = count(values).shares(scale)
    assert shares.zero == (scaled == 0).sum().item() / number
    assert shares.below == ((scaled > 0) & (scaled < 2.0**-24)).sum().item() / number
    assert shares.inside == ((scaled >= 2.0**-24) & (scaled < 2.0**16)).sum().item() / number
    assert shares.above == ((scaled >= 2.0**16) & finite).sum().item() / number
    assert shares.not_finite == (~finite).sum().item() / number
    assert sum(shares) == pytest.approx(1.0)


def test_scaling_saves_what_leaves_the_lower_end_and_loses_what_passes_the_upper() -> None:
    histogram = count(torch.tensor([2.0**-30, 2.0**-25, 0.0, 1.0, 2.0**14]))
    assert (histogram.saved(8.0), histogram.lost(8.0)) == (1 / 5, 1 / 5)
    assert (histogram.saved(1.0), histogram.lost(1.0)) == (0.0, 0.0)


def test_a_scale_that_would_split_bins_is_refused() -> None:
    for scale in (1000.0, 0.0, -2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a power of two"):
            count(torch.ones(3)).shares(scale)


@pytest.mark.parametrize("head_room", [1.0, 2.0, 4.0, 3.0])
def test_the_constant_scale_is_the_largest_power_of_two_that_fits(head_room: float) -> None:
    torch.manual_seed(0)
    edges = [65504 * 2.0**e for e in (-40, -8, 0, 3)] + [2.0**e for e in (-149, -126, -14, 0, 15, 16, 17, 100)]
    just_under = torch.tensor(edges).nextafter(torch.tensor(0.0)).tolist()
    for largest in [*edges, *just_under, *torch.randn(50).abs().tolist()]:
        value = float(torch.tensor(largest))
        if value == 0:
            continue
        fitting = [2.0**e for e in range(-150, 128) if Fraction(2) ** e * Fraction(value) * Fraction(head_room) < 65504]
        assert count(torch.tensor([value, value / 3])).constant_scale(head_room) == max(fitting)


def test_no_constant_scale_is_chosen_for_nothing_but_zeros() -> None:
    assert count(torch.zeros(4)).constant_scale() is None


# -- training -----------------------------------------------------------------------------------------------------


def silent() -> Console:
    return Console(file=io.StringIO(), width=60)


def histogram(every_n_steps: int = 1, **options: Any) -> GradientHistogram:
    return GradientHistogram(every_n_steps, console=silent(), **options)


def precision(name: str) -> tuple[MasterWeightPrecision | None, dict[str, Any]]:
    if name.startswith("mpt-"):
        return MasterWeightPrecision(name.removeprefix("mpt-")), {}  # type: ignore[arg-type]
    return None, {"precision": name}


@pytest.mark.parametrize("name", ["32-true", "bf16-true", "bf16-mixed", "mpt-bf16-true", "mpt-16-true"])
def test_training_is_bit_for_bit_what_it_is_without(name: str) -> None:
    def train(callbacks: list[L.Callback]) -> dict[str, Tensor]:
        module = Classifier(nn.Sequential(mlp(), nn.BatchNorm1d(4), nn.ReLU(inplace=True)))
        plugin, options = precision(name)
        options |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
        fit(module, classification(8), plugin, callbacks=callbacks, **options)
        return module.state_dict()

    callback = histogram(2, activations=True)
    with_it, without = train([callback]), train([])
    assert all(torch.equal(with_it[key], without[key]) for key in without)
    assert sum(one.total for one in callback.activations.values()) > 0


@pytest.mark.parametrize("batches", [12, 13])
def test_one_step_in_n_is_counted_whole(batches: int) -> None:
    module, callback = Classifier(mlp()), histogram(3, activations=True)
    fit(module, classification(batches), callbacks=[callback], accumulate_grad_batches=2)
    steps = math.ceil(batches / 2)
    samples = math.ceil(steps / 3)
    owners = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    assert set(callback.weights) == owners
    numel = sum(parameter.numel() for parameter in module.parameters())
    assert sum(one.total for one in callback.weights.values()) == samples * numel
    # Activations of every micro-batch of a sampled step: 32 examples of 64 features after the first layer.
    micro_batches = sum(min(2, batches - 2 * step) for step in range(0, steps, 3))
    assert callback.activations["net.0"].total == micro_batches * 32 * 64


class Kept(L.Callback):
    """The gradients of the first step, to be counted by someone else."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.gradients += [parameter.grad.clone() for parameter in module.parameters()]


def distance(one: ExponentHistogram, other: ExponentHistogram) -> float:
    """Total variation: the share of values that would have to move to another bin."""
    a, b = as_counter(one), as_counter(other)
    return sum(abs(a[key] / one.total - b[key] / other.total) for key in a | b) / 2


@pytest.mark.parametrize(
    "plugin",
    [
        MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(init_scale=2.0**14, growth_interval=2)),
        MasterWeightPrecision("16-true", loss_scale=ConstantLossScale(1000.0)),
        MasterWeightPrecision("bf16-true", loss_scale=2.0**10),
    ],
    ids=["fp16 dynamic", "fp16 constant 1000", "bf16 constant 1024"],
)
def test_scaled_half_gradients_are_counted_as_the_true_ones_of_fp32(plugin: MasterWeightPrecision) -> None:
    reference, ours = histogram(activations=True), histogram(activations=True)
    fit(Classifier(mlp()), classification(8), callbacks=[reference])
    fit(Classifier(mlp()), classification(8), plugin, callbacks=[ours])
    for kind in ("weights", "activations"):
        expected, seen = getattr(reference, kind), getattr(ours, kind)
        assert set(expected) == set(seen)
        for path in expected:
            assert distance(expected[path], seen[path]) < DISTANCE, (kind, path)
    assert ours.constant_scale == reference.constant_scale


@pytest.mark.parametrize("fused", [False, True])
def test_under_mixed_precision_true_gradients_are_counted_too(fused: bool) -> None:
    """Its GradScaler unscales before a plain optimizer's step, and within a fused one's."""
    reference, mixed = histogram(activations=True), histogram(activations=True)
    fit(Classifier(mlp(), adamw(fused=fused)), classification(4), callbacks=[reference])
    plugin: Any = MixedPrecision("16-mixed", "cpu")
    fit(Classifier(mlp(), adamw(fused=fused)), classification(4), plugin, callbacks=[mixed])
    for kind in ("weights", "activations"):
        for path, expected in getattr(reference, kind).items():
            assert distance(expected, getattr(mixed, kind)[path]) < DISTANCE, (kind, path)


def test_weights_are_counted_as_the_gradients_of_the_step_say() -> None:
    callback, kept = histogram(), Kept()
    fit(Classifier(mlp()), classification(3), callbacks=[kept, callback])
    gradients = torch.cat([gradient.reshape(-1) for gradient in kept.gradients])
    whole = ExponentHistogram.sum(callback.weights.values())
    assert whole == count(gradients)
    assert callback.constant_scale == max(
        2.0**e for e in range(-50, 60) if 2.0**e * 4 * gradients.abs().max().item() < 65504
    )


def test_the_loggers_get_the_last_sample(tmp_path: Path) -> None:
    callback, kept = histogram(2), Kept()
    logger = CSVLogger(tmp_path)
    fit(Classifier(mlp()), classification(5), callbacks=[kept, callback], logger=logger, log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    per_step = len(kept.gradients) // 5
    last = torch.cat([gradient.reshape(-1) for gradient in kept.gradients[-per_step:]])
    assert rows[-1]["gradients/zero"] == pytest.approx((last == 0).float().mean().item())
    below = (last != 0) & (last.abs() < 2.0**-24)
    assert rows[-1]["gradients/below_fp16"] == pytest.approx(below.float().mean().item())
    sampled = [g for step in (0, 2, 4) for g in kept.gradients[step * per_step : (step + 1) * per_step]]
    assert rows[-1]["gradients/largest"] == pytest.approx(max(g.abs().max().item() for g in sampled))


def test_gradients_that_are_freed_within_backward_are_refused() -> None:
    plugin = MasterWeightPrecision("bf16-true", gradient_release=True)
    with pytest.raises(ValueError, match="gradient_release=True frees each within backward"):
        fit(Classifier(mlp()), classification(2), plugin, callbacks=[histogram()])


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": 1.5}, {"head_room": 0.5}], ids=str)
def test_a_wrong_argument_is_refused_by_name(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GradientHistogram(**options)


def test_no_hook_outlives_an_exception() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    module = Failing(mlp())
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, classification(2), callbacks=[histogram(activations=True)])
    assert not any(part._forward_hooks for part in module.modules())


# -- tables and pictures ------------------------------------------------------------------------------------------


def made_by_hand() -> dict[str, dict[str, ExponentHistogram]]:
    values = awkward(torch.float32)
    modules = {f"model.encoder.layers[bold].{i}.self_attention.projection": count(values) for i in range(14)}
    return {"weights": {"": count(torch.zeros(3)), **modules}, "activations": {"a": count(values * 2.0**-20)}}


def test_tables_fit_60_columns_with_every_figure_whole() -> None:
    console = silent()
    print_histograms(made_by_hand(), 2.0**-127, 4.0, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    names = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert "model.encoder.layers[bold].9.self_attention.projection" in names
    assert "5 others" in text
    shares = count(awkward(torch.float32)).shares()
    assert f"{100 * shares.below:.1f} %" in text
    assert all(line.count("%") == 3 for line in lines if line.startswith(("2^3 ", "│ 2^3 ")))


def test_a_run_without_gradients_says_so() -> None:
    console = silent()
    print_histograms({}, None, 4.0, console)
    assert "No gradients were seen" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot_is_drawn_when_training_ends(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"exponents.{kind}"
    fit(Classifier(mlp()), classification(2), callbacks=[histogram(activations=True, plot=path)])
    beginning = path.read_bytes()[:5]
    assert beginning == (b"\x89PNG\r" if kind == "png" else b"<?xml")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-mpt\[plots\]'"):
        write_histogram_plot(made_by_hand(), None, tmp_path / "exponents.png")
