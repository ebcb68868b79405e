"""The Triton kernels compiled for an A100 and an H100: how wide they move memory, and what they need."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
MOVED = {"float32": 4, "split": 2, "split8": 1, "bfloat16": 2, "8bit": 1}
ELEMENTS = 16
"""That each of a program's 128 threads works on."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, str, dict[str, Any]]]:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout)]


@pytest.mark.slow
def test_kernels_move_16_bytes_at_a_time_and_spill_nothing(
    compiled: list[tuple[int, str, str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print("\nregisters per thread")
        for capability, dtype, name, result in compiled:
            print(f"  sm_{capability} {dtype:15} {name:20} {result['registers']}")
    assert {capability for capability, *_ in compiled} == {80, 90}
    for capability, dtype, name, result in compiled:
        case = f"sm_{capability} {dtype} {name}: {result}"
        assert result["stack_bytes"] == 0, case
        assert result["registers"] <= 128, case
        loads, stores = (
            sum(count for move, count in result["moves"].items() if move.startswith(kind) and "v4" in move)
            for kind in ("ld", "st")
        )
        if name == "scan":
            # 8192 elements of 2 bytes over 128 threads: 128 bytes for each.
            assert loads == 8, case
            continue
        if name in ("row_losses_kernel", "gradient_kernel"):
            # 4096 elements of 2 bytes over 256 threads: 32 bytes for each, in the part for whole blocks.
            assert loads == 2, case
            assert stores == (2 if name == "gradient_kernel" else 0), case
            continue
        masters, moments = name.split(", ")
        per_element = [2, MOVED[masters], MOVED[moments], MOVED[moments]]
        if masters == "float32":
            assert loads == sum(ELEMENTS * size // 16 for size in per_element), case  # the half weight is not read
        else:
            assert loads == sum(ELEMENTS * size // 16 for size in [2, *per_element]), case
        assert stores == sum(ELEMENTS * size // 16 for size in per_element), case
