"""A few training steps under Lightning's Trainer in which nothing is computed: fake module, fake batch, real loops.

The Trainer, its precision plugin and the optimizer are the real ones, so their casts, copies and states come in the
order in which they would. Only the strategy's teardown is left out, which would move a fake module about.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from ..collect.session import Session
from ..lightning import MemoryProfiler
from ..recording import Recording
from ..report import MemoryReport
from .devices import CUDA, Device
from .lstm import has_lstm, without_onednn
from .memory import DataDependent, FakeFunctions, FakeMemory

_NONE = object()
NO_LIMIT = 1 << 62
STEPS = 2
"""The first makes the optimizer's state, the second is counted."""


NEEDS_VALUES = (DataDependent, DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where an operation's result depends on values."""


class EstimateError(RuntimeError):
    """The step cannot be run on fake tensors. One line says why."""


class Trial:
    """What is to be estimated: a module and its data, made anew on fakes for every run.

    Args:
        module: makes the LightningModule. Called where all tensors are fake.
        data: a LightningDataModule, a DataLoader or an iterable of batches; None where the module has its own
            `train_dataloader`. One real batch is taken from it, once.
    """

    def __init__(self, module: Callable[[], Any], data: Any = None) -> None:
        self._make_module = module
        self._data = data
        self._batch: Any = None

    def run(
        self,
        trainer_arguments: Callable[[], Mapping[str, Any]],
        device: Device = CUDA,
        *,
        batch_size: int | None = None,
    ) -> MemoryReport:
        """The report of one step.

        Args:
            trainer_arguments: makes what the Trainer is given beside what a trial needs: the precision, clipping.
            device: the one to imagine.
            batch_size: cut or repeat the batch to that many samples; None for the size that it has.

        Raises:
            EstimateError: the step needs values that only a run on a device has, or ends the process.
        """
        memory = FakeMemory(device.block_bytes, device.workspace_bytes, device.scratch, device.amend)
        given = dict(trainer_arguments())
        profiler = _TrialProfiler(memory, device)
        try:
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(_quiet())
                stack.enter_context(_default_dtype_kept())
                stack.enter_context(device.kernels())
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                stack.enter_context(memory)
                stack.enter_context(FakeFunctions())
                stack.enter_context(_replaced(nn.init, "_no_grad_trunc_normal_", _drawn))
                module = self._make_module()
                stack.enter_context(_taken_for_real())
                if has_lstm(module) and not device.lstms_by_onednn():
                    stack.enter_context(without_onednn())
                with suppress(_Enough):
                    self._fit(module, profiler, given, batch_size)
        except NEEDS_VALUES as error:
            raise EstimateError(f"{_reason(error)}, which fake tensors cannot tell") from error
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes the one of the other
                raise error.__context__ from None
            raise EstimateError(f"the training wants to end the process, by sys.exit({error.code!r})") from error
        recording = profiler.recording
        if recording is None:
            raise EstimateError("no training step was run: the training ended before the second")
        recording.device = f"{device.name} (estimated)"
        # No module took the time that it would take.
        recording.forwards = {path: replace(forward, time_ns=0) for path, forward in recording.forwards.items()}
        recording.notes += [*profiler.device_notes, *_guesses(memory)]
        return MemoryReport.from_recording(_owned_alone(recording))

    def _fit(self, module: Any, profiler: "_TrialProfiler", given: Mapping[str, Any], batch_size: int | None) -> None:
        module._apply = partial(_apply_in_place, module)
        data, batches = self._data, STEPS * given.get("accumulate_grad_batches", 1)
        owner: Any = data if isinstance(data, pl.LightningDataModule) else module if data is None else None
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=_FakeStrategy(torch.device("cpu")),
            max_epochs=1,  # not so many steps, of which every optimizer makes one
            num_sanity_val_steps=0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            profiler=profiler,
            callbacks=[_Watch(profiler)],
            **given,
        )
        if owner is None:
            trainer.fit(module, _FakeBatches(self._first_batch(lambda: data), batch_size, batches))
            return
        loader = owner.train_dataloader

        def fake_loader() -> _FakeBatches:
            return _FakeBatches(self._first_batch(loader), batch_size, batches)

        with _replaced(owner, "train_dataloader", fake_loader):
            if owner is module:
                trainer.fit(module)
                return
            with ExitStack() as stack:
                for hook in ("prepare_data", "setup"):  # its data is real
                    stack.enter_context(_replaced(owner, hook, _on_real(getattr(owner, hook))))
                trainer.fit(module, datamodule=owner)

    def _first_batch(self, loader: Callable[[], Any]) -> Any:
        if self._batch is None:
            with _disable_current_modes():
                self._batch = next(iter(loader()), _NONE)
            if self._batch is _NONE:
                self._batch = None
                raise EstimateError("the data gives no batch")
        return self._batch

    @property
    def batch_size(self) -> int:
        """How many samples the batch has, once it was loaded."""
        return _batch_size(self._batch)


class _TrialProfiler(MemoryProfiler):
    """Records what happens to memory that is not there, and keeps quiet about it."""

    def __init__(self, memory: FakeMemory, device: Device) -> None:
        super().__init__(warmup_steps=STEPS - 1, steps=1, max_events=NO_LIMIT)
        self._source = memory
        self._device = device
        self.recording: Recording | None = None
        self.device_notes: list[str] = []

    @override
    def _make_session(self, find_duplicates: bool = False) -> Session:
        trainer = self._trainer()
        self.device_notes = self._device.notes(trainer.lightning_module)
        for optimizer in trainer.optimizers:
            self._device.prepare(optimizer)
        return super()._make_session()  # without duplicates: they are found by their values, and here there are none

    @override
    def _finish(self, *notes: str) -> None:
        schedule, self._schedule = self._schedule, None
        self._leave()
        if schedule is not None:
            self.recording = schedule.finish()

    @override
    def describe(self) -> None: ...


class _Enough(Exception):
    """Every batch that is wanted has been: the end of the epoch, with its schedules and metrics, is not."""


class _Watch(pl.Callback):
    """Ends training when the recording is there. A module that writes to its logger finds one, that writes nothing."""

    def __init__(self, profiler: _TrialProfiler) -> None:
        self._profiler = profiler

    @override
    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.loggers = [DummyLogger()]

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if self._profiler.recording is not None:
            raise _Enough


class _FakeStrategy(SingleDeviceStrategy):
    @override
    def teardown(self) -> None:
        """A fake module is left where it is: it is dropped as a whole."""


class _FakeBatches:
    """The same batch again and again, in new memory each time, as a loader gives it."""

    def __init__(self, batch: Any, batch_size: int | None, count: int) -> None:
        self._batch = batch
        self._count = count
        self._now, self._wanted = (1, 1) if batch_size is None else (_batch_size(batch), batch_size)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            yield apply_to_collection(self._batch, Tensor, self._fake)

    def _fake(self, tensor: Tensor) -> Tensor:
        shape = tensor.shape
        if self._wanted != self._now and tensor.dim() and shape[0] == self._now:
            shape = (self._wanted, *shape[1:])  # type: ignore[assignment]
        return torch.empty(shape, dtype=tensor.dtype)


def _batch_size(batch: Any) -> int:
    """The first dimension of the batch's first tensor that has one."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.dim() else None)
    if not sizes:
        raise EstimateError("the batch holds no tensor with a dimension, so its size cannot be told")
    return sizes[0]


def _owned_alone(recording: Recording) -> Recording:
    """Of what is older than the recording, only what has an owner: the rest is on the host, where a module keeps it."""
    owned = {claim.address for claim in recording.claims}
    recording.start = [
        event
        for event in recording.start
        if event.address in owned or event.requested_bytes in recording.workspace_bytes
    ]
    return recording


def _guesses(memory: FakeMemory) -> list[str]:
    if not memory.guesses:
        return []
    first = next(iter(memory.guesses))
    return [
        f"Numbers read on the host (first at {first}) were taken for 1, or true: a step that goes another way for "
        "other values would need other memory."
    ]


def _reason(error: BaseException) -> str:
    if isinstance(error, DataDependent):
        return str(error)
    return f"the step needs the values of {str(error).partition('.')[2] or error}"


def _drawn(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """`nn.init.trunc_normal_`, which would draw for ever until all fake numbers are within the bounds."""
    return tensor


def _on_real(method: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    return run


def _apply_in_place(root: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which for fake parameters would swap tensors and give up where one has a weak reference."""
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = function(parameter.data)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return root


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _taken_for_real() -> Iterator[None]:
    """transformers, which looks for fakes, goes the way that it goes in training.

    For fakes it builds an attention mask of (batch, 1, queries, keys). In training it looks first whether every token
    is to be seen, and then builds none.
    """
    imports = sys.modules.get("transformers.utils.import_utils")
    if not hasattr(imports, "is_fake_tensor"):
        yield
        return
    with _replaced(imports, "is_fake_tensor", lambda _: False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """What Lightning would say of devices and precisions is not about them here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)
