"""What oneDNN's LSTM keeps for backward, by rule and in truth."""

import pytest
import torch
from torch import nn

from benchmarks.estimate import Case, estimated
from benchmarks.estimate import lstm as network
from examples.train_gpt import multiplies_bf16
from lightning_mpt.profiler.estimate import lstm

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 6), (2, 33, 100, 30), (40, 20, 24, 40), (12, 8, 64, 64), (5, 3, 20, 256)]
"""Steps, samples, inputs, hidden units."""


HALF = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not multiplies_bf16(), reason="half LSTMs do without oneDNN on this CPU"),
    id="bfloat16",
)


@pytest.mark.skipif(not lstm.rule_holds(), reason="oneDNN has another LSTM on this CPU, or none")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), HALF])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])  # the input comes with its steps first all the same
def test_the_workspace_is_as_large_as_onednns(
    batch_first: bool, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    steps, batch, inputs, hidden = shape
    layer = nn.LSTM(inputs, hidden, dtype=dtype)
    state = torch.zeros(batch, hidden, dtype=dtype)
    weights = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
    options = (False, [], 2, hidden, 1, True, False, batch_first, True)
    arguments = (torch.zeros(steps, batch, inputs, dtype=dtype), *weights, state, state, *options)
    kept = torch.ops.aten.mkldnn_rnn_layer(*arguments)
    *_, by_rule = lstm.with_workspace(torch.ops.aten.mkldnn_rnn_layer.default, arguments, kept)
    assert by_rule.nbytes == kept[3].nbytes
    assert by_rule is not kept[3]


def test_where_the_rule_does_not_hold_lstms_are_counted_without_onednn_and_a_note_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lstm, "_fits", lambda: False)
    shape = {"features": 16, "width": 32, "layers": 2, "steps": 12, "batch_size": 8}
    without = estimated("32-true", Case(network, shape, onednn=False))
    assert estimated("32-true", Case(network, shape)).categories == without.categories
    assert "without oneDNN" in lstm.lstm_unknowns(nn.LSTM(2, 2))[0]
    assert lstm.lstm_unknowns(nn.Linear(2, 2)) == []
