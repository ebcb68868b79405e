"""The measurements of the CUDA check, one per process: `python -m benchmarks.cuda_pieces PIECE ANSWER.json`.

`benchmarks.cuda` starts them. Each returns a JSON object with a `summary` for the terminal.
"""

import contextlib
import copy
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import SILENT, Timing, cuda_clock, gpt_shapes, interleave
from benchmarks.contenders import (
    UNDER_AUTOCAST,
    Step,
    autocast_step,
    flash_step,
    parameters,
    scaled_step,
    scanned_step,
    torch_adamw,
    total,
)
from benchmarks.profiler import step_cost
from benchmarks.step_clock import StepClock
from examples.train_gpt import ByteText, GPTModule, quiet_lightning
from lightning_mpt import PRESETS, MasterAdamW
from lightning_mpt.cross_entropy import cross_entropy
from lightning_mpt.precisions import trainer_arguments
from lightning_mpt.profiler import MemoryProfiler

TENSORS_PARAMETERS = 10_000_000
SHAPES: dict[str, dict[str, int]] = {
    "10M": {"width": 256, "layers": 12},
    "100M": {"width": 768, "layers": 12, "vocab_size": 50304},
    "1B": {"width": 2048, "layers": 18, "vocab_size": 50304},
}
DEVICE = "cuda"
"""Said once: the tests put the CPU in its place, so that a slip here is not found on a rented GPU."""
VOCAB_SIZE = 50304
CASES = {"long": ("small", 8, 1024, 25), "short": ("small", 4, 128, 25), "xl": ("xl", 4, 1024, 14)}
"""What is trained: the size of GPT-2 (small has 124 million parameters, xl 1.5 billion), batch size, tokens per
sequence, and steps, of which the last are timed. In the long case most of the memory is
activations, in the short one the model."""
COPY, COPY_BYTES = "device copy of 1 GiB", 2**30
LOGITS_ROWS = 8192
CLOCK_HZ = 3e9
"""At least as fast as any GPU's clock, by which it is told how long to wait."""
UNTIMED_STEPS = 8
"""The warm-up, what is recorded, and as many again, in which the report is made."""


class Losses(L.Callback):
    """Keeps what the steps came to, on the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().float())


def train(length: str, precision: str) -> dict[str, Any]:
    """Train GPT-2: its peak by category, its step time and its losses."""
    quiet_lightning()
    L.seed_everything(0, verbose=False)
    size, batch_size, seq_len, steps = CASES[length]
    with torch.device(DEVICE):
        module = GPTModule(size, vocab_size=VOCAB_SIZE, seq_len=1024, lr=3e-4, steps=steps, warmup_steps=5)
    data = ByteText(seq_len=seq_len, batch_size=batch_size, steps=steps)
    clock, losses, profiler = StepClock(), Losses(), MemoryProfiler(tempfile.mkdtemp(), warmup_steps=2, steps=3)
    trainer = L.Trainer(
        accelerator=DEVICE,
        devices=1,
        max_epochs=1,
        gradient_clip_val=None if precision.endswith(":minimal") else 1.0,
        callbacks=[clock, losses],
        profiler=profiler,
        **SILENT,
        limit_val_batches=0,
        **trainer_arguments(precision),
    )
    trainer.fit(module, data)
    report = profiler.report
    timing = Timing.of(clock.seconds()[UNTIMED_STEPS:])
    found = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "peak_bytes": report.peak_bytes,
        "reserved_bytes": report.reserved_bytes,
        "categories": plain(report.categories),
        "phases": plain(report.phases),
        "allocator_peak_bytes_of_the_run": torch.cuda.max_memory_allocated(),
        "step_s": timing.median_s,
        "step_p20_s": timing.p20_s,
        "step_p80_s": timing.p80_s,
        "losses": [round(loss.item(), 4) if loss.isfinite() else None for loss in losses.losses],
        "skipped_steps": getattr(trainer.precision_plugin, "skipped_steps", None),
        "loss_scale": getattr(trainer.precision_plugin, "loss_scale", None),
    }
    peak, step, last = f"{report.peak_bytes / 2**30:.3f} GiB", f"{1e3 * timing.median_s:.1f} ms", found["losses"][-1]
    found["summary"] = f"peak {peak}, step {step}, last loss {last}"
    return found


def step(size: str) -> dict[str, Any]:
    """Time optimizer steps over models of `size`: ours in its formats, torch's with all that it needs, flashoptim's."""
    return time_steps(gpt_shapes(**SHAPES[size]), few=size == "1B")


def tensors(count: str) -> dict[str, Any]:
    """Time steps over ten million parameters in `count` tensors of one size: what a tensor costs."""
    return time_steps([(TENSORS_PARAMETERS // int(count),)] * int(count))


def time_steps(shapes: list[tuple[int, ...]], *, few: bool = False) -> dict[str, Any]:
    """Time every case in turn, round by round. `few`: only those that fit together on a device at a billion.

    What FP32 training under autocast needs beside the fused step is timed with it: GradScaler's look at the gradients,
    and the half copies of the weights that autocast makes anew after each step (`recast`).
    """
    count = total(shapes)
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    cases: dict[str, Step] = {COPY: lambda: target.copy_(source)}
    moved = {COPY: 2.0 * source.numel()}
    left_out: dict[str, str] = {}
    syncs: dict[str, str] = {}

    def add(name: str, moved_bytes: float, build: Callable[[], Step]) -> None:
        try:
            call = build()
            for _ in range(3):  # the first makes the state; a kernel is compiled here
                call()
            torch.cuda.synchronize()
            syncs[name] = synchronizes(call)
            cases[name], moved[name] = call, moved_bytes * count
        except Exception as error:  # no memory for this one, or it cannot run: the others still can
            left_out[name] = f"{type(error).__name__}: {error}"
            gc.collect()
            torch.cuda.empty_cache()

    def ours(dtype: torch.dtype, **storages: Any) -> Callable[[], Step]:
        return lambda: scanned_step(MasterAdamW(parameters(shapes, dtype, DEVICE), lr=1e-3, **storages), DEVICE)

    add(UNDER_AUTOCAST, 28 + 8 + 6, lambda: autocast_step(shapes, DEVICE))
    add("mpt exact, fp16", 26 + 2, ours(torch.float16))
    add("mpt compact, fp16", 12.125 + 2, ours(torch.float16, **PRESETS["compact"]))
    add("flashoptim 24 bits and 8, bf16", 12.125, lambda: flash_step(shapes, DEVICE))
    if not few:
        add("torch fused, fp32", 28, lambda: torch_adamw(shapes, DEVICE, fused=True).step)
        add("torch foreach, fp32", 28, lambda: torch_adamw(shapes, DEVICE, foreach=True).step)
        add("mpt exact, bf16", 26 + 2, ours(torch.bfloat16))
        add("mpt float32 masters, bf16", 28 + 2, ours(torch.bfloat16, master_weights="float32"))
        add("mpt bfloat16 moments, bf16", 18 + 2, ours(torch.bfloat16, optimizer_state="bfloat16"))
        add("mpt compact, bf16", 12.125 + 2, ours(torch.bfloat16, **PRESETS["compact"]))
        add(
            "mpt exact, fp16, GradScaler",
            26 + 4,
            lambda: scaled_step(MasterAdamW(parameters(shapes, torch.float16, DEVICE)), DEVICE),
        )
    timings = interleave(cases, rounds=20, warmup=3, clock=cuda_clock)
    late: dict[str, list[bool]] = {name: [] for name in cases}
    ahead = interleave(
        {name: behind(call, timings[name].median_s, late[name]) for name, call in cases.items()},
        rounds=10, warmup=1, clock=_itself,
    )  # fmt: skip
    copy_rate = moved[COPY] / ahead[COPY].median_s
    found: dict[str, Any] = {"parameters": count, "tensors": len(shapes), "cases": {}, "left_out": left_out}
    for name, timing in timings.items():
        rate = moved[name] / ahead[name].median_s
        found["cases"][name] = {
            **timing._asdict(),
            "device_s": ahead[name].median_s,
            "device_p20_s": ahead[name].p20_s,
            "device_p80_s": ahead[name].p80_s,
            "host_was_ahead": not any(late[name]),
            "moved_bytes": moved[name],
            "bytes_per_s": rate,
            "share_of_copy": rate / copy_rate,
            "times_under_autocast": ratio(name, timings),
            "device_times_under_autocast": ratio(name, ahead),
            "host_synchronization": syncs.get(name),
        }
    found["summary"] = "; ".join(
        f"{name}: {case['median_s'] * 1e3:.2f} ms, device {case['device_s'] * 1e3:.2f} ms ({case['share_of_copy']:.0%})"
        for name, case in found["cases"].items()
    )
    failed = {name: why for name, why in left_out.items() if not why.startswith("ModuleNotFoundError")}
    if failed:
        found["error"] = f"{len(failed)} failed: " + "; ".join(f"{name}: {why}" for name, why in failed.items())
    return found


def trace() -> dict[str, Any]:
    """Record a step of a very small GPT under `mpt-16-true`, and keep the trace, for the ledger's tests."""
    quiet_lightning()
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler = MemoryProfiler(folder, warmup_steps=2, steps=1, save_trace=path)
        trainer = L.Trainer(
            accelerator=DEVICE,
            devices=1,
            max_epochs=1,
            profiler=profiler,
            **SILENT,
            limit_val_batches=0,
            **trainer_arguments("mpt-16-true"),
        )
        trainer.fit(GPTModule("nano", seq_len=64, steps=5), ByteText(seq_len=64, batch_size=4, steps=5))
        report = profiler.report
        return {
            "summary": f"peak {report.peak_bytes:,} bytes, unattributed {report.categories.get('unattributed', 0):,}",
            "peak_bytes": report.peak_bytes,
            "categories": plain(report.categories),
            # Since the recorded step began, when they were set back.
            "allocator_peaks": {
                name: torch.cuda.memory_stats().get(f"{name}_bytes.all.peak") for name in ("allocated", "requested")
            },
            "trace": path.read_text(encoding="utf-8"),
        }


def ratio(name: str, timings: dict[str, Timing]) -> float | None:
    """How many times the FP32 step's time, with all that it needs under autocast."""
    return timings[name].median_s / timings[UNDER_AUTOCAST].median_s if UNDER_AUTOCAST in timings else None


def behind(call: Callable[[], object], host_s: float, late: list[bool]) -> Callable[[], float]:
    """Gives the seconds of `call` on a device that is behind the host, as it is while it trains: it waits for nothing.

    `host_s` is how long the host takes for the call at most. The device is kept busy until the host is done; `late`
    gets whether it had begun by then, since a full queue of launches holds the host up.
    """

    def timed() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int((1.5 * host_s + 1e-3) * CLOCK_HZ))
        start.record()
        call()
        late.append(start.query())
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return timed


def _itself(timed: Callable[[], object]) -> float:
    """A clock for what measures its own time."""
    seconds: float = timed()  # type: ignore[assignment]
    return seconds


def loss(classes: str) -> dict[str, Any]:
    """Time cross entropy of many half logits, forward and backward: ours, and torch's in FP32."""
    logits = torch.randn(LOGITS_ROWS, int(classes), device=DEVICE).to(torch.bfloat16).requires_grad_()
    target = torch.randint(int(classes), (LOGITS_ROWS,), device=DEVICE)

    def step(of: Callable[[Tensor], Tensor]) -> Step:
        def call() -> None:
            of(logits).backward()
            logits.grad = None

        return call

    cases = {
        "mpt": step(lambda x: cross_entropy(x, target, -100, "mean")),
        "torch, in FP32": step(lambda x: F.cross_entropy(x.float(), target)),
    }
    timings = interleave(cases, rounds=20, warmup=3, clock=cuda_clock)
    found: dict[str, Any] = {"rows": LOGITS_ROWS, "classes": int(classes)}
    found["cases"] = {name: timing._asdict() for name, timing in timings.items()}
    found["summary"] = "; ".join(f"{name}: {1e3 * timing.median_s:.2f} ms" for name, timing in timings.items())
    return found


def recording(length: str) -> dict[str, Any]:
    """What recording costs: step times of GPT-2 without a recorder, with one that records, and one that is done."""
    size, batch_size, seq_len, _ = CASES[length]
    module = GPTModule(size, vocab_size=VOCAB_SIZE, seq_len=1024).to(DEVICE)
    tokens = torch.randint(0, 256, (batch_size, seq_len + 1), device=DEVICE)

    def training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
        net = copy.deepcopy(module.gpt).bfloat16()
        optimizer = MasterAdamW(net.parameters(), lr=1e-4)

        def step() -> None:
            logits = net(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return net, optimizer, step

    costs = step_cost(training, rounds=15, synchronize=torch.cuda.synchronize)
    found = {**costs, "batch_size": batch_size, "seq_len": seq_len}
    found["summary"] = f"recording {costs['recording']:.3f}x, not recording {costs['not_recording']:.3f}x"
    return found


def synchronizes(call: Callable[[], object]) -> str:
    """`none`, or what torch says of the first place where `call` waits for the device."""
    try:
        with sync_is_error():
            call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "none"


@contextlib.contextmanager
def sync_is_error() -> Iterator[None]:
    """Within, a call that makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def plain(value: Any) -> Any:
    """A report's mappings and records as JSON's own types, with names for keys."""
    if isinstance(value, dict):
        return {str(getattr(key, "value", key)): plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def main(piece: str, answer: str) -> None:
    """Run `piece`, `KIND` or `KIND:DETAIL` or, of training, `train:LENGTH:PRECISION`, and write what it found."""
    kinds = {"trace": trace, "step": step, "tensors": tensors, "loss": loss, "train": train, "recording": recording}
    kind, *details = piece.split(":", 2)  # a precision may have a colon of its own
    found = kinds[kind](*details)
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.stdin.read()  # all is imported: wait for the turn
    main(*sys.argv[1:])
