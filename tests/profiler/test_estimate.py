"""An estimate beside what is measured: the same step under the Trainer, once run and once imagined."""

import functools
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import network_zoo
from benchmarks.estimate import PRECISIONS, TARGET, Case, convnet, errors, estimated, figures, gpt2, lstm, measured, mlp
from lightning_mpt.cli.estimate import estimate
from lightning_mpt.profiler.estimate import CPU, EstimateError, Trial
from lightning_mpt.profiler.estimate.lstm import rule_holds

GPT2 = Case(gpt2, {"layers": 1, "width": 64, "vocab_size": 256, "seq_len": 64, "batch_size": 4})
MLP = Case(mlp, {"features": 64, "width": 256, "layers": 2, "batch_size": 1024})
CONVNET = Case(convnet, {"width": 16, "size": 32, "batch_size": 32})
LSTM = Case(lstm, {"features": 16, "width": 32, "layers": 2, "steps": 12, "batch_size": 8}, onednn=False)
ONEDNN = LSTM._replace(
    shape={**LSTM.shape, "features": 24, "width": 72, "steps": 24, "batch_size": 32}, onednn=rule_holds()
)
FEW_LONG = ONEDNN._replace(shape={**ONEDNN.shape, "steps": 100, "batch_size": 2})
PAIRS = [
    *[pytest.param(GPT2, precision, id=f"gpt2-{precision}") for precision in PRECISIONS["cpu"]],
    *[pytest.param(MLP, precision, id=f"mlp-{precision}") for precision in ("32-true", "bf16-mixed")],
    *[pytest.param(CONVNET, precision, id=f"convnet-{precision}") for precision in ("32-true", "mpt-bf16-true")],
    *[pytest.param(LSTM, precision, id=f"lstm-{precision}") for precision in ("32-true", "bf16-mixed")],
    *[pytest.param(ONEDNN, precision, id=f"lstm-onednn-{precision}") for precision in ("32-true", "mpt-bf16-true")],
    pytest.param(FEW_LONG, "32-true", id="lstm-onednn-few-long-32-true"),
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Every thread of a CPU's half kernels has blocks of its own, which are much beside networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("case", "precision"), PAIRS)
def test_no_category_is_off_by_three_percent_of_the_measured_peak(case: Case, precision: str) -> None:
    real, guess = measured(precision, case), estimated(precision, case)
    assert {name: error for name, error in errors(figures(real), figures(guess)).items() if abs(error) > TARGET} == {}
    assert guess.device == "cpu (estimated)"
    assert guess.parameters == real.parameters
    # Not only what there is, but whose it is.
    assert {path for path, own in guess.modules.items() if own.get("activations")} == {
        path for path, own in real.modules.items() if own.get("activations")
    }


class Regression(L.LightningModule):
    """A layer on data of its own. `reads` is what training_step asks of the loss or the batch."""

    def __init__(self, reads: Any = None, width: int = 64) -> None:
        super().__init__()
        self.layer = nn.Linear(32, width)
        self._reads = reads

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        self.logger.log_metrics({"loss": 0.0})
        if self._reads is not None:
            self._reads(loss, batch)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(64, 32)), batch_size=16, shuffle=True)


def test_the_modules_own_data_is_loaded_for_real_and_its_batch_can_be_of_any_size() -> None:
    trial = Trial(Regression)
    reports = {size: estimate(trial, "32-true", device="cpu", batch_size=size) for size in (None, 16, 48)}
    assert trial.batch_size == 16
    assert reports[None].categories == reports[16].categories
    assert reports[48].categories["inputs"] == 3 * reports[16].categories["inputs"] == 48 * 32 * 4


class Drawn(Regression):
    """Its weights are drawn anew until all are within bounds."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        draw(self.layer.weight)


def redrawn(weight: Tensor) -> None:
    with torch.no_grad():
        while (weight.normal_().abs() > 8).any():
            pass


def test_several_optimizers_that_step_in_each_batch_are_all_there() -> None:
    class Twice(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.parameters()), torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)]

    one, two = (estimate(Trial(kind), "32-true", device="cpu").categories for kind in (Regression, Twice))
    assert two["optimizer_state"] == one["optimizer_state"] + one["weights"]


def test_the_end_of_an_epoch_is_not_waited_for() -> None:
    class Plateau(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    assert estimate(Trial(Plateau), "32-true", device="cpu").steps == 1


def test_weights_drawn_from_a_truncated_normal_are_drawn_once() -> None:
    """torch draws those beyond the bounds again, and of fake ones it cannot tell that none is left."""
    plain, drawn = (estimate(Trial(make), "32-true") for make in (Regression, lambda: Drawn(nn.init.trunc_normal_)))
    assert drawn.categories == plain.categories


def test_a_loop_that_waits_for_a_number_ends_with_its_place() -> None:
    with pytest.raises(EstimateError, match=r"test_estimate.py:\d+ reads numbers on the host again and again"):
        estimate(Trial(lambda: Drawn(redrawn)), "32-true")


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask-of-ones"])
@pytest.mark.parametrize("precision", ["32-true", "mpt-bf16-true"])
def test_gpt2_keeps_nothing_that_grows_with_the_square_of_the_sequence(precision: str, masked: bool) -> None:
    """On CUDA its attention is causal without a mask: transformers makes none where no token is hidden."""

    def activations(seq_len: int) -> int:
        tokens = torch.zeros(2, seq_len, dtype=torch.long)
        batch = {"input_ids": tokens, "labels": tokens, **({"attention_mask": tokens + 1} if masked else {})}
        return estimate(Trial(lambda: network_zoo.Step(network_zoo.gpt2(1, 1)), [batch]), precision).categories[
            "activations"
        ]

    short, middle, long = (activations(seq_len) for seq_len in (128, 256, 384))
    assert long - middle == middle - short


class Data(L.LightningDataModule):
    """Its samples come about in `setup`, from values."""

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        order = torch.randperm(8).tolist()
        self.samples = TensorDataset(torch.tensor(order, dtype=torch.float32)[:, None].expand(8, 32).contiguous())

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_size=4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [torch.cat([tensor, tensor]) for tensor in batch]


def test_a_data_module_is_set_up_for_real_and_its_hooks_take_part() -> None:
    data = Data()
    report = estimate(Trial(Regression, data), "32-true", device="cpu")
    assert not isinstance(data.samples.tensors[0], torch._subclasses.FakeTensor)
    assert report.categories["inputs"] == 2 * 4 * 32 * 4
    assert "setup" not in vars(data)


def test_gradients_that_accumulate_are_there_when_the_second_batch_begins() -> None:
    settings = {"accumulate_grad_batches": 2}
    report = estimate(Trial(Regression), "32-true", device="cpu", settings=settings)
    assert report.steps == 1
    assert report.phases["forward"].categories["gradients"] == (32 * 64 + 64) * 4


def test_floating_numbers_that_are_read_on_the_host_are_noted() -> None:
    trial = Trial(functools.partial(Regression, lambda loss, batch: [loss.item(), bool(loss.isfinite())]))
    (note,) = estimate(trial, "32-true", device="cpu").notes
    assert note.startswith("Numbers read on the host (first at test_estimate.py:")


def test_a_loss_may_be_printed_and_asked_whether_it_is_finite() -> None:
    class Careful(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            loss = super().training_step(batch, batch_idx)
            text = f"{loss} {loss:.3f} {(loss > 0).sum():d} {torch.tensor(2.5):.1f}"
            return None if torch.isnan(loss) or loss.isinf().any() or not text.endswith("2.5") else loss

    plain, careful = (estimate(Trial(kind), "32-true", device="cpu") for kind in (Regression, Careful))
    assert careful.notes == ()
    assert careful.categories["optimizer_state"] == plain.categories["optimizer_state"]


def test_the_place_that_reads_is_known_under_every_precision() -> None:
    trial = Trial(functools.partial(Regression, lambda loss, batch: loss.item()))
    (note,) = estimate(trial, "mpt-bf16-true", device="cpu").notes
    assert note.startswith("Numbers read on the host (first at test_estimate.py:")


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (lambda loss, batch: int(batch[0].argmax()), r"test_estimate.py:\d+ reads a whole number"),
        (lambda loss, batch: batch[0].nonzero(), "nonzero"),
        (lambda loss, batch: loss.detach().numpy(), "NumPy"),
    ],
    ids=["whole-number", "nonzero", "numpy"],
)
def test_a_step_that_depends_on_values_is_refused(reads: Any, said: str) -> None:
    with pytest.raises(EstimateError, match=f"{said}.*fake tensors cannot tell"):
        estimate(Trial(functools.partial(Regression, reads)), "32-true", device="cpu")


def test_layers_that_torch_copies_can_be_built_and_nothing_stays_behind() -> None:
    class Encoder(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 3)

    before = torch.get_default_dtype(), F.dropout, torch.backends.mkldnn.enabled
    trial = Trial(Encoder, [[torch.zeros(4, 10, 32)]])
    assert estimate(trial, "mpt-bf16-true").peak_bytes > 0
    assert (torch.get_default_dtype(), F.dropout, torch.backends.mkldnn.enabled) == before
    assert (torch.zeros(2) + 1).tolist() == [1, 1]


def test_data_without_a_batch_says_so() -> None:
    with pytest.raises(EstimateError, match="no batch"):
        Trial(Regression, []).run(dict, CPU)
