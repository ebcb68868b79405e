"""The networks' benchmark: its lines say what an estimate says, and its result is whole, kept, and goes on."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import network_zoo, networks, words
from benchmarks.network_zoo import Network, gpt2
from lightning_mpt.cli.estimate import estimate
from lightning_mpt.profiler.estimate import Trial

TOKENS = ((16,), 50257)
ROUNDING = 1e-3
"""Of a peak: blocks of 512 bytes are no line."""


def small_gpt2(layers: int = 1, heads: int = 1) -> Network:
    sample = {"input_ids": TOKENS, "labels": TOKENS}
    return Network("GPT-2 small", partial(gpt2, layers, heads), sample, 16, "transformers")


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))


WORKSPACES = 65 * 2**20
"""Of cuBLAS, which every step on CUDA has."""
CONVNET = Network("AlexNet", convnet, {"images": ((3, 32, 32), None), "labels": ((), 1000)}, 16, "here")


@pytest.mark.parametrize("network", [small_gpt2(), CONVNET], ids=["gpt2", "convnet"])
def test_the_largest_batch_fits_and_a_few_more_do_not(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "MEMORIES", {"few": WORKSPACES + 10**8, "many": WORKSPACES + 37 * 10**7})
    row = networks.row(network, "mpt-16-true")
    for name, size in row["largest_batch"].items():
        fits, more = (
            networks.phases_of(network, "mpt-16-true", samples)[0] for samples in (size, size + size // 100 + 1)
        )
        assert fits.peak_bytes <= networks.MEMORIES[name] * (1 + ROUNDING)
        assert more.peak_bytes > networks.MEMORIES[name]


def test_a_line_through_few_layers_is_the_peak_of_many() -> None:
    few = {layers: networks.phases_of(small_gpt2(layers), "16-mixed", 64)[1] for layers in (2, 4)}
    whole, _ = networks.phases_of(small_gpt2(9), "16-mixed", 64)
    assert max(networks.through(few, 9).values()) == pytest.approx(whole.peak_bytes, rel=1e-3)


def test_a_parabola_through_three_widths_is_the_peak_of_a_fourth() -> None:
    few = {heads: networks.phases_of(small_gpt2(1, heads), "mpt-16-true:compact", 4)[1] for heads in (2, 4, 6)}
    whole, _ = networks.phases_of(small_gpt2(1, 9), "mpt-16-true:compact", 4)
    assert max(networks.through(few, 9).values()) == pytest.approx(whole.peak_bytes, rel=1e-3)


def test_fp32_takes_16_bytes_a_parameter_and_what_grows_with_the_batch() -> None:
    network = small_gpt2(2, 2)
    one, two, three = (networks.phases_of(network, "32-true", size)[0] for size in (1, 64, 128))
    state = [sum(one.categories[category] for category in networks.MODEL), 16 * one.parameters]
    assert state[0] == pytest.approx(state[1], rel=1e-3)
    assert three.categories["activations"] == pytest.approx(2 * two.categories["activations"], rel=1e-3)


@pytest.mark.parametrize(
    ("shown", "other"), [("16-mixed", "bf16-mixed"), ("mpt-16-true:compact", "mpt-bf16-true:compact")]
)
def test_what_is_not_shown_twice_is_the_same(shown: str, other: str) -> None:
    a, b = (networks.phases_of(small_gpt2(), precision, 4)[0] for precision in (shown, other))
    assert a.peak_bytes == pytest.approx(b.peak_bytes, rel=1e-4)


def test_the_family_has_the_sizes_of_gpt2() -> None:
    for name in ("GPT-2 small", "GPT-2 medium", "GPT-2 large"):
        size = network_zoo.GPT2[name]
        assert networks.family_heads(size["layers"]) == size["heads"]


@pytest.mark.parametrize(
    ("name", "millions"), [("GPT-2 XL", 1557.6), ("BERT-large", 335.2), ("ViT-B/16", 86.6), ("ResNet-50", 25.6)]
)
def test_the_networks_have_as_many_parameters_as_people_say(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = network_zoo.networks()[name].build()
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_result_is_whole_and_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_zoo, "networks", lambda: {"AlexNet": CONVNET})
    monkeypatch.setattr(networks, "MEMORIES", {"24 GB": 10**8, "80 GB": 2 * 10**8, "140 GB": 4 * 10**8})
    out = tmp_path / "networks.json"
    arguments = ["--network", "AlexNet", "--jobs", "1", "--out", str(out), "--images", str(tmp_path)]
    work, count = networks.work, 0

    def stopped(name: str, precision: str) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return work(name, precision)

    monkeypatch.setattr(networks, "work", stopped)
    with pytest.raises(KeyboardInterrupt):
        networks.main(arguments)
    assert len(json.loads(out.read_text())["networks"]) == 2
    assert networks.main(arguments) == 0
    assert count == 3 + len(networks.PRECISIONS) - 2
    result = json.loads(out.read_text())
    assert [row["precision"] for row in result["networks"]] == list(networks.PRECISIONS)
    assert all(sum(row["categories"].values()) == row["peak_bytes"] for row in result["networks"])
    assert result["networks"][0]["saved"] == 0 < result["networks"][-1]["saved"]
    assert [claim["about"] for claim in result["networks"][0]["claims"]] == ["activations", "gradients", "weights"]
    assert (tmp_path / "networks.png").read_bytes().startswith(b"\x89PNG")


def test_a_call_for_one_network_leaves_the_others_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also networks that this machine cannot build: their rows stay, and say at which commit they were made."""
    monkeypatch.setattr(network_zoo, "networks", lambda: {"AlexNet": CONVNET})
    monkeypatch.setattr(networks, "PRECISIONS", ("32-true", "16-true"))
    monkeypatch.setattr(networks, "MEMORIES", {"24 GB": 10**8, "80 GB": 2 * 10**8, "140 GB": 4 * 10**8})
    out = tmp_path / "networks.json"
    arguments = ["--jobs", "1", "--out", str(out), "--network", "AlexNet"]
    monkeypatch.setenv("LIGHTNING_MPT_COMMIT", "a" * 40)
    assert networks.main(arguments) == 0
    before = json.loads(out.read_text())
    for row in before["networks"]:
        row["network"] = "VGG-16"
    networks.write_result(out, before)

    monkeypatch.setenv("LIGHTNING_MPT_COMMIT", "b" * 40)
    assert networks.main(arguments) == 0
    after = json.loads(out.read_text())
    assert [row["network"] for row in after["networks"]] == ["AlexNet", "AlexNet", "VGG-16", "VGG-16"]
    stayed = after["networks"][2:]
    assert stayed == [{**row, "environment": before["environment"]} for row in before["networks"]]
    assert after["environment"]["commit"] == "b" * 40
    said = words.source(after)
    assert "commit bbbbbbbbbb" in said
    assert "; VGG-16: " in said
    assert "commit aaaaaaaaaa" in said


def test_a_real_step_stands_beside_its_estimate() -> None:
    found = networks.measured(CONVNET, "32-true", 16, accelerator="cpu")
    guess = estimate(Trial(CONVNET.module, [CONVNET.batch()]), "32-true", device="cpu", batch_size=16)
    assert found["measured_peak_bytes"] == pytest.approx(guess.peak_bytes, rel=0.03)


def test_measuring_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert networks.main(["--measure"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_an_unknown_network_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        networks.main(["--network", "AlexNette"])
    assert "'AlexNette' is not one of" in capsys.readouterr().err


def test_a_network_of_a_missing_library_names_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_zoo, "has_torchvision", lambda: False)
    with pytest.raises(SystemExit):
        networks.main(["--network", "AlexNet"])
    assert "'AlexNet' is torchvision's, which is not installed here" in capsys.readouterr().err
