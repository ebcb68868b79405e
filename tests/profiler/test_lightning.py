"""MemoryProfiler in real Trainers, on CPU."""

import json
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mpt.profiler import Category, MemoryProfiler, MemoryReport

from .hooks import hooks_on


class Classifier(L.LightningModule):
    def __init__(self, fail_in: str | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
        self.fail_in = fail_in
        self.hooks_seen: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.hooks_seen.append(bool(hooks_on(self)))
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        self._fail("training_step", batch_idx)
        return loss

    def on_after_backward(self) -> None:
        self._fail("on_after_backward", self.global_step)

    def on_train_batch_end(self, *_: Any) -> None:
        self._fail("on_train_batch_end", self.global_step)

    def _fail(self, where: str, step: int) -> None:
        if self.fail_in == where and step >= 3:
            raise RuntimeError("the step fails")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


class Manual(Classifier):
    """Two optimizers in turn, as for a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.net[0].parameters()), torch.optim.SGD(self.net[3].parameters(), lr=0.1)]


class Recomputing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        y_hat = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)
        return nn.functional.cross_entropy(y_hat, y)


def data(batches: int = 8, **options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32 * batches, 64, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 10, (32 * batches,), generator=generator)), 32, **options)


def trainer(profiler: MemoryProfiler | None, tmp_path: Any, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(profiler=profiler, **{**defaults, **options})


def fit(module: L.LightningModule, tmp_path: Any, profiler: MemoryProfiler | None = None, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    built = trainer(profiler or MemoryProfiler(), tmp_path, **options)
    built.fit(module, data())
    return built


def assert_all_is_off(module: nn.Module, built: L.Trainer, callbacks: int) -> None:
    assert hooks_on(module) == []
    assert not torch._C._autograd._profiler_enabled()
    assert len(built.callbacks) == callbacks


@pytest.fixture
def callbacks(tmp_path: Any) -> int:
    return len(trainer(None, tmp_path).callbacks)


@pytest.mark.parametrize("kind", [Classifier, Manual, Recomputing])
def test_a_fit_is_reported(kind: type[Classifier], tmp_path: Any, callbacks: int, capsys: Any) -> None:
    module = kind()
    built = fit(module, tmp_path)
    report = built.profiler.report
    parameters = sum(p.numel() for p in module.parameters())
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories[Category.WEIGHTS] == 4 * parameters
    assert report.categories[Category.INPUTS] == 32 * 64 * 4 + 32 * 8
    assert report.categories[Category.UNATTRIBUTED] <= max(0.01 * report.peak_bytes, 5056 + 64)
    assert set(report.phases) == {"forward", "backward", "optimizer_step"}
    assert report.steps == 3
    assert MemoryReport.load(tmp_path / "memory_report.json") == report
    printed = capsys.readouterr().out
    assert "optimizer_state" in printed
    assert printed.count("phase peaks") == 1
    assert_all_is_off(module, built, callbacks)


def test_phases_are_told_apart_inside_the_optimizers_closure(tmp_path: Any) -> None:
    """Lightning runs forward and backward inside Optimizer.step, and zeroes the gradients between the two."""
    phases = fit(Classifier(), tmp_path).profiler.report.phases
    parameters = 256 * 65 + 10 * 257
    assert phases["forward"].categories[Category.GRADIENTS] == 4 * parameters  # those of the step before
    assert phases["forward"].categories[Category.ACTIVATIONS] > 2 * 32 * 256 * 4
    assert phases["optimizer_step"].categories[Category.GRADIENTS] == 4 * parameters
    assert phases["optimizer_step"].categories[Category.ACTIVATIONS] == 0


def test_recording_changes_no_result_and_is_on_in_its_steps_only(tmp_path: Any) -> None:
    plain, recorded = Classifier(), Classifier()
    recorded.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    trainer(None, tmp_path).fit(plain, data())
    fit(recorded, tmp_path, MemoryProfiler(warmup_steps=2, steps=3))
    for a, b in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(a, b)
    assert recorded.hooks_seen == [False, True, True, True, True, False, False, False]


def test_a_second_fit_is_reported_anew(tmp_path: Any) -> None:
    profiler = MemoryProfiler()
    fit(Classifier(), tmp_path, profiler)
    first = profiler.report
    fit(Manual(), tmp_path, profiler)
    assert profiler.report.phases.keys() == first.phases.keys()
    assert profiler.report != first


def test_validation_in_between_ends_the_recording(tmp_path: Any) -> None:
    for every, counted in ((4, 2), (2, 2), (3, 1)):
        profiler = MemoryProfiler(warmup_steps=2, steps=5)
        built = trainer(profiler, tmp_path, val_check_interval=every)
        built.fit(Validated(), data(), data(1))
        assert profiler.report.steps == counted
        assert profiler.report.notes == (f"Validation ended the recording after {counted} of 5 steps.",)


def test_a_recording_goes_on_over_epochs(tmp_path: Any) -> None:
    profiler = MemoryProfiler(warmup_steps=1, steps=4)
    built = trainer(profiler, tmp_path, max_epochs=4)
    built.fit(Classifier(), data(2))
    assert profiler.report.steps == 4
    assert profiler.report.categories[Category.UNATTRIBUTED] <= 0.01 * profiler.report.peak_bytes


def test_micro_batches_and_clipping(tmp_path: Any) -> None:
    report = fit(Classifier(), tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0).profiler.report
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.phases["backward"].categories[Category.GRADIENTS] <= 4 * report.parameters


def test_fewer_steps_than_asked_for_are_reported_if_any_counted(tmp_path: Any) -> None:
    assert fit(Classifier(), tmp_path, max_steps=4).profiler.report.steps == 2
    with pytest.warns(UserWarning, match="There is no memory report: fit ended after too few steps"):
        built = fit(Classifier(), tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match="warmup_steps=2 and at least one more"):
        _ = built.profiler.report


@pytest.mark.filterwarnings("ignore:Profiler clears events at the end of each cycle:UserWarning")
def test_a_module_that_profiles_itself_is_told_why_there_is_no_report(tmp_path: Any) -> None:
    class Profiling(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx != 3:
                return super().training_step(batch, batch_idx)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
                return super().training_step(batch, batch_idx)

    module = Profiling()
    with pytest.warns(UserWarning, match="no memory report: torch.profiler was started in the recorded steps"):
        built = fit(module, tmp_path)
    assert built.global_step == 8
    assert hooks_on(module) == []
    assert list(tmp_path.iterdir()) == []


def test_no_report_without_a_fit(tmp_path: Any) -> None:
    profiler = MemoryProfiler()
    with pytest.raises(RuntimeError, match="fit has not run"):
        _ = profiler.report
    trainer(profiler, tmp_path).validate(Validated(), data(1), verbose=False)
    with pytest.raises(RuntimeError, match="fit has not run"):
        _ = profiler.report


def test_where_the_files_go(tmp_path: Any) -> None:
    files = {"save_trace": tmp_path / "traces" / "t.json", "save_snapshot": tmp_path / "memory_snapshot.pickle"}
    profiler = MemoryProfiler(tmp_path / "reports", "run", **files)
    fit(Classifier(), tmp_path, profiler)
    assert json.loads((tmp_path / "reports" / "run.json").read_text())["peak_bytes"] == profiler.report.peak_bytes
    assert MemoryReport.from_trace(tmp_path / "traces" / "t.json") == profiler.report
    assert {path.name for path in tmp_path.iterdir()} == {"reports", "traces"}
    assert "save_snapshot wrote nothing" in profiler.report.notes[0]  # on a CPU


def test_a_file_is_named_json_once(tmp_path: Any) -> None:
    fit(Classifier(), tmp_path, MemoryProfiler(filename="run.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_files_go_with_each_trainer(tmp_path: Any) -> None:
    profiler = MemoryProfiler()
    for name in ("first", "second"):
        fit(Classifier(), tmp_path / name, profiler)
        assert MemoryReport.load(tmp_path / name / "memory_report.json") == profiler.report
    profiler.dirpath = tmp_path / "mine"
    fit(Classifier(), tmp_path / "third", profiler)
    assert (tmp_path / "mine" / "memory_report.json").exists()


def test_what_cannot_be_written_costs_a_warning_and_no_run(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "file").touch()  # where a folder is wanted
    profiler = MemoryProfiler(tmp_path / "file" / "reports", save_trace=tmp_path / "file" / "trace.json")
    with pytest.warns(UserWarning, match="was not written to") as warned:
        built = fit(Classifier(), tmp_path, profiler)
    said = [str(one.message) for one in warned if "was not written to" in str(one.message)]
    assert said == [
        f"The trace was not written to {tmp_path}/file/trace.json: File exists.",
        f"The memory report was not written to {tmp_path}/file/reports/memory_report.json: Not a directory.",
    ]
    assert built.global_step == 8
    assert profiler.report.steps == 3
    assert capsys.readouterr().out.count("phase peaks") == 1


def test_the_processes_hear_of_each_other_before_anything_is_written(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is stopped by its disk must not keep the others waiting."""
    seen = []

    def worst(report: MemoryReport | None) -> tuple[int, MemoryReport | None]:
        seen.append((tmp_path / "memory_report.json").exists())
        return 0, report

    monkeypatch.setattr("lightning_mpt.profiler.lightning.worst", worst)
    fit(Classifier(), tmp_path)
    assert seen == [False]
    assert (tmp_path / "memory_report.json").exists()


def test_the_precision_plugin_says_what_its_tensors_are(tmp_path: Any) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    class Plugin(MixedPrecision):
        masters = torch.ones(1000)

        def memory_categories(self) -> Any:
            yield "master_weights", self.masters, None

    report = fit(Classifier(), tmp_path, plugins=[Plugin("bf16-mixed", "cpu")]).profiler.report
    assert report.categories[Category.MASTER_WEIGHTS] == 4000
    assert sum(report.categories.values()) == report.peak_bytes


def test_bf16_halves_what_arithmetic_says(tmp_path: Any) -> None:
    whole = fit(Classifier(), tmp_path).profiler.report
    half = fit(Classifier(), tmp_path, precision="bf16-true").profiler.report
    shares = {"optimizer_step": (Category.WEIGHTS, Category.GRADIENTS), "forward": (Category.ACTIVATIONS,)}
    for phase, categories in shares.items():
        for category in categories:
            sizes = [report.phases[phase].categories[category] for report in (whole, half)]
            assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.02)


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps=0"), ({"warmup_steps": -2}, "warmup_steps=-2")])
def test_wrong_counts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryProfiler(**options)


def test_the_end_of_data_of_unknown_length_ends_no_recording(tmp_path: Any) -> None:
    """Lightning tells of the end while it fetches, by an exception that is none."""

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([(torch.ones(32, 64), torch.zeros(32, dtype=torch.long))] * 2)

    profiler = MemoryProfiler(warmup_steps=1, steps=4)
    built = trainer(profiler, tmp_path, max_epochs=4)
    callbacks, module = len(built.callbacks), Classifier()
    built.fit(module, DataLoader(Stream(), batch_size=None))
    assert profiler.report.steps == 4
    assert_all_is_off(module, built, callbacks)


class Noting(L.pytorch.loggers.Logger):
    name, version = "noting", 0

    def __init__(self) -> None:
        self.noted: list[tuple[dict[str, float], int | None]] = []
        self.done = False

    def log_hyperparams(self, *_: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert not self.done
        if "mpt/peak_bytes" in metrics:
            self.noted.append((metrics, step))

    def finalize(self, status: str) -> None:
        self.done = True


@pytest.mark.parametrize(("max_steps", "step"), [(8, 5), (4, 4)], ids=["while training", "at its end"])
def test_loggers_get_the_peak_and_its_parts(max_steps: int, step: int, tmp_path: Any) -> None:
    loggers = [Noting(), Noting()]
    built = trainer(MemoryProfiler(), tmp_path, logger=loggers, max_steps=max_steps)
    built.fit(Classifier(), data())
    expected = {f"mpt/peak_{category}_bytes": size for category, size in built.profiler.report.categories.items()}
    expected["mpt/peak_bytes"] = built.profiler.report.peak_bytes
    assert loggers[0].noted == loggers[1].noted == [(expected, step)]
