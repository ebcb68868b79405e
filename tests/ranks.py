"""Two processes that train together: what each runs, and how a test starts them.

Over gloo on the CPU, or, with MPT_TEST_ACCELERATOR=cuda, over NCCL on two GPUs.

A test calls `run("module:function", folder)`. Each process imports the function, calls it with its rank and the folder,
and what it returns comes back, by rank.
"""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).parent
TIMEOUT_S = 300
TWO: dict[str, Any] = {
    "accelerator": os.environ.get("MPT_TEST_ACCELERATOR", "cpu"),
    "devices": 2,
    "use_distributed_sampler": False,
}
"""What every Trainer of two ranks is told."""


def run(target: str, folder: Path, ranks: int = 2) -> list[Any]:
    """Run `target` in as many processes, and give what each returned: tensors and plain values."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        variables = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        log = (folder / f"rank{rank}.log").open("w")
        command = [sys.executable, "-W", "ignore", str(TESTS / "ranks.py"), target, str(folder)]
        processes.append((subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT), log))
    try:
        codes = [process.wait(TIMEOUT_S) for process, _ in processes]
    finally:
        for process, log in processes:
            process.kill()
            log.close()
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with status {code}:\n" + (folder / f"rank{rank}.log").read_text()[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", map_location="cpu", weights_only=True) for rank in range(ranks)]


def assert_all_skipped_one_step(ranks: list[dict[str, Any]], case: str = "poisoned") -> None:
    """The third step, and the scale of 2**10 was halved."""
    for rank in ranks:
        result = rank[case]
        assert result["skipped"] == 1
        assert result["scale"] == 2.0**9
        before, skipped, after = result["seen"][1:4]
        assert torch.equal(before, skipped)
        assert not torch.equal(skipped, after)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


def main(target: str, folder: Path) -> None:
    module, _, function = target.partition(":")
    rank = int(os.environ["RANK"])
    result = getattr(importlib.import_module(module), function)(rank, folder)
    torch.save(result, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
