"""What every benchmark shares: the record of where it ran, interleaved timing, and one way to write results.

Cases that are compared are timed in turn, round by round (A B C, A B C, ...), in one process: a machine that slows
down for a while then slows all of them, and the ratio of their medians holds where single times do not.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = RESULTS / "quick"
SILENT = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""What a Trainer is told that is to train and nothing else."""
MISSED = 3
"""The exit status of a benchmark that came to its end and found a goal missed: its result is kept like any other."""
PACKAGES = ("lightning-mpt", "torch", "lightning", "transformers", "triton")


class Timing(NamedTuple):
    """Seconds per call: the median, and the 20th and 80th percentiles as a measure of noise."""

    median_s: float
    p20_s: float
    p80_s: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def environment(module: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Where, with what and by which command a result came about: a JSON object with no path or host name in it."""
    return {
        "command": " ".join(["python", "-m", module, *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit that was measured, with `+changes` where the files differ from it.

    A copy of the tree without its git folder says it in the variable LIGHTNING_MPT_COMMIT.
    """
    if told := os.environ.get("LIGHTNING_MPT_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "HEAD")
        # Code is what is measured: results, and the pages and pictures that are made of them, change from run to run.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+changes" if changed else head


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu() -> dict[str, Any] | None:
    """The first CUDA device: its name, compute capability and memory. None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time every case once per round, after `warmup` untimed rounds."""
    clock = clock or wall_clock
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_index in range(warmup + rounds):
        for name, call in cases.items():
            taken = clock(call)
            if round_index >= warmup:
                seconds[name].append(taken)
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that `call` takes on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock(call: Callable[[], object]) -> float:
    """Seconds from when the device begins the work of `call` until it ends, launch gaps included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def gpt_shapes(width: int, layers: int, vocab_size: int = 0) -> list[tuple[int, ...]]:
    """The shapes of a GPT's parameters: matrices, biases and norms; an embedding where `vocab_size` is given."""
    block: list[tuple[int, ...]] = [
        (3 * width, width), (3 * width,), (width, width), (width,),
        (4 * width, width), (4 * width,), (width, 4 * width), (width,),
        *[(width,)] * 4,
    ]  # fmt: skip
    return ([(vocab_size, width)] if vocab_size else []) + block * layers


def without_paths(text: str) -> str:
    """`text` with this machine's folders left out, fit to be kept in the repository."""
    for folder, name in (
        (str(ROOT), "."),
        (sys.prefix, "PREFIX"),
        (sys.base_prefix, "PREFIX"),
        (str(Path.home()), "~"),
    ):
        if folder != "/":
            text = text.replace(folder, name)
    return text


def apart(module: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """What `python -m benchmarks.MODULE --child ARGUMENTS` answers, in a fresh process: the last line that it prints.

    Raises:
        RuntimeError: it failed; with what it said.
        subprocess.TimeoutExpired: it took longer than `limit_s`, and was ended.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--child", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    if done.returncode != 0:
        said = without_paths(done.stderr)
        raise RuntimeError(f"{module}, {' '.join(arguments)}: ended with status {done.returncode}:\n{said}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def result_path(name: str, *, quick: bool) -> Path:
    """Where a result goes if nobody says: a quick one never in the place of a kept one."""
    return (QUICK_RESULTS if quick else RESULTS) / f"{name}.json"


def earlier(path: Path, where: Mapping[str, Any], same: Sequence[str] = ("commit",)) -> dict[str, Any] | None:
    """The result that is there already, if it was made where `where` says, as far as the keys `same` go."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if all(result["environment"].get(key) == where[key] for key in same) else None


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON: to a new file first, so that a result cut short never replaces a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def slug(name: str) -> str:
    """`name` as a part of a file name: `NVIDIA H200` gives `nvidia-h200`."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout.strip()
