"""`strategy="ddp"`: two processes over gloo, through the Trainer."""

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from ranks import assert_all_skipped_one_step, flat, run
from replicas import STEPS, net
from training import Classifier, classification, loader, mlp, trainer

from lightning_mpt import MasterWeightPrecision

DISTANCE = {"bf16-true": 0.12, "16-true": 0.06}
"""Of the way that FP32 training has gone under the same strategy: worst seen 0.08 and 0.03."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks came to."""
    return run("replicas:everything", tmp_path_factory.mktemp("ranks"))


CASES = [f"{precision}, {accumulated}" for precision in DISTANCE for accumulated in (1, 4)]
VIEWS = [f"views, {case}" for case in CASES]


@pytest.mark.parametrize("case", [*CASES, *VIEWS, "clips, 16-true", "compact", "poisoned", "sgd"])
def test_ranks_that_start_from_different_weights_end_alike_bit_for_bit(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (flat(rank[case]["weights"]) for rank in ranks)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", CASES)
def test_the_masters_end_where_fp32_training_ends(ranks: list[dict[str, Any]], case: str) -> None:
    precision, _, accumulated = case.partition(", ")
    start, fp32 = flat(net(0).state_dict()), flat(ranks[0][f"32-true, {accumulated}"]["weights"])
    ours = flat(ranks[0][case]["weights"])
    assert (ours - fp32).norm() <= DISTANCE[precision] * (fp32 - start).norm()


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_lie_in_the_buckets_train_alike_bit_for_bit(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        assert torch.equal(flat(rank[f"views, {case}"]["weights"]), flat(rank[case]["weights"]))
        assert rank[f"views, {case}"]["views"] == [True] * STEPS


@pytest.mark.parametrize("case", CASES)
def test_half_gradients_are_reduced_as_half(ranks: list[dict[str, Any]], case: str) -> None:
    """2 bytes a parameter and step, whatever they were summed up in."""
    dtype = torch.bfloat16 if case.startswith("bf16") else torch.float16
    step_bytes = 2 * sum(parameter.numel() for parameter in net(0).parameters())
    for rank in ranks:
        assert rank[f"views, {case}"]["wire"] == {dtype: STEPS * step_bytes}


@pytest.mark.parametrize("precision", DISTANCE)
def test_a_module_that_clips_its_true_gradients_trains_as_in_fp32(ranks: list[dict[str, Any]], precision: str) -> None:
    """They are FP32 when the step is taken, and the next ones are half again when they are reduced."""
    start, fp32 = flat(net(0).state_dict()), flat(ranks[0]["clips, None"]["weights"])
    ours = flat(ranks[0][f"clips, {precision}"]["weights"])
    assert (ours - fp32).norm() <= DISTANCE[precision] * (fp32 - start).norm()


def test_fabric_trains_alike_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(flat(rank["fabric"]["weights"]), flat(rank["bf16-true, 1"]["weights"]))


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    assert_all_skipped_one_step(ranks)


def test_a_run_resumes_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(flat(rank["resumed"]["stopped"]), flat(rank["resumed"]["whole"]))


def test_gradient_release_is_refused_with_the_reason(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "DistributedDataParallel" in rank["released"]


@pytest.mark.parametrize("derived", [False, True])
def test_strategies_with_masters_of_their_own_are_refused_with_what_to_use(derived: bool) -> None:
    class DeepSpeedStrategy(SingleDeviceStrategy):  # the real one needs its package
        pass

    module = Classifier(mlp())

    class Tuned(DeepSpeedStrategy):
        pass

    strategy = (Tuned if derived else DeepSpeedStrategy)(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"(DeepSpeedStrategy|Tuned) keeps FP32 masters.*ModelParallelStrategy"):
        trainer(MasterWeightPrecision("bf16-true"), strategy=strategy).fit(module, loader(classification(1)))
    with pytest.raises(TypeError, match=r"FSDPPrecision.*MasterWeightPrecision"):
        FSDPStrategy().precision_plugin = MasterWeightPrecision("bf16-true")
