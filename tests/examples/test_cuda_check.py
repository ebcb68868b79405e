"""The CUDA check on a machine without a GPU: it says so, and its pieces are tried on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cuda, cuda_pieces
from benchmarks.common import wall_clock

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_says_so_on_one_line_and_exits_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_piece_that_fails_hangs_or_finds_no_time_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"good": "pass", "bad": "print('broke'); raise SystemExit(3)", "hangs": "import time; time.sleep(60)"}
    written = 'import json, sys; open(sys.argv[1], "w").write(json.dumps({"summary": "found", "trace": "{}"}))'

    class Started(cuda.Started):
        def __init__(self, name: str) -> None:
            super().__init__("none")
            self._process.end()
            command = [sys.executable, "-c", f"import sys; sys.stdin.read(); {code[name]}; {written}", self._answer]
            self._process = cuda.Guarded([str(part) for part in command], tmp_path)

    here = {"command": "python -m benchmarks.cuda", "gpu": {"name": "A GPU"}}
    pieces = [cuda.Piece("bad", 9.0), cuda.Piece("hangs", 5.0), cuda.Piece("good", 9.0), cuda.Piece("good", 1.0)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(cuda, "environment", lambda *_: here)
    monkeypatch.setattr(cuda, "plan", lambda: pieces)
    monkeypatch.setattr(cuda, "Started", Started)
    monkeypatch.setattr(cuda, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cuda, "FIXTURES", tmp_path / "fixtures")

    assert cuda.main(["--out", str(tmp_path / "out")]) == 1
    (kept,) = (tmp_path / "results").iterdir()
    found = json.loads(kept.read_text())
    assert found["environment"] == here
    assert found["pieces"]["bad"]["error"] == "ended with status 3"
    assert found["pieces"]["bad"]["output_tail"] == "broke\n"
    assert found["pieces"]["hangs"]["error"] == "ran past 5 s and was ended"
    assert "the time for the whole check had run out" in found["pieces"]["good"]["error"]  # the second of that name
    assert (tmp_path / "out" / kept.name).read_text() == kept.read_text()
    for folder in ("fixtures", "out"):
        assert (tmp_path / folder / "cuda_trace.json").read_text() == "{}"


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_are_found_and_skip_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = cuda.run_tests(120.0)
    assert "error" not in found, found["output_tail"]
    assert found["failed"] == []
    assert re.fullmatch(r"\d+ skipped in .*", found["closing_line"])


@pytest.fixture
def _cpu_for_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CPU in the GPU's place, and everything small."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DEVICE": "cpu",
        "VOCAB_SIZE": 256,
        "CASES": {"short": ("nano", 2, 16, 12)},
        "COPY_BYTES": 2**20,
        "LOGITS_ROWS": 8,
        "TENSORS_PARAMETERS": 1000,
        "SHAPES": {"10M": {"width": 16, "layers": 1}},
        "cuda_clock": wall_clock,
        "synchronizes": lambda call: "none",
        "behind": lambda call, host_s, late: lambda: wall_clock(call),
    }.items():
        monkeypatch.setattr(cuda_pieces, name, value)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 0)
    monkeypatch.setattr("torch.cuda.memory_stats", dict)


@pytest.mark.usefixtures("_cpu_for_cuda")
@pytest.mark.parametrize(
    "piece",
    [
        "train:short:32-true",
        "train:short:mpt-bf16-true:compact",
        "step:10M",
        "tensors:10",
        "trace",
        "recording:short",
        "loss:40",
    ],
)
def test_every_kind_of_piece_runs(piece: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda_pieces.main(piece, str(tmp_path / "answer.json"))
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found["summary"]
    if piece.startswith(("step", "tensors")):
        assert len(found["cases"]) == 11
        assert list(found["left_out"]) == ["flashoptim 24 bits and 8, bf16"]  # not installed, or not for a CPU
        assert all(case["median_s"] > 0 for case in found["cases"].values())
    elif piece.startswith("loss"):
        assert all(case["median_s"] > 0 for case in found["cases"].values())
    elif piece.startswith("recording"):
        assert found["recording"] > 0
        assert found["not_recording"] > 0
    else:
        assert found.get("error") is None
        assert sum(found["categories"].values()) == found["peak_bytes"]
