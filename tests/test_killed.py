"""A run that is killed, at any time or in the middle of a save, goes on from its last checkpoint as if it were not.

SIGKILL, which no one can catch, hits a process of its own. That no half-written file takes the place of a whole one is
Lightning's doing: it writes a temporary file and renames it. A rename is all or nothing within one file system, so the
temporary directory (TMPDIR) and the checkpoints must be on the same.
"""

import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LinearLR
from training import Classifier, Resumable, classification, mlp, trainer

from lightning_mpt import PRESETS, DynamicLossScale, MasterWeightPrecision

EPOCH, EPOCHS = 10, 2
PATIENCE = 60
"""Seconds to wait for the other process; it takes a few."""
KINDS = {"16-true": ("16-true", "exact"), "bf16-true-compact": ("bf16-true", "compact")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lightning.pytorch", "lightning_mpt"])


def configure(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCH * EPOCHS)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(kind: str, folder: Path, ckpt: Path | None = None) -> tuple[list[float], dict[str, Any]]:
    """Train with a checkpoint after every step, from the start or from a file: the losses and the last checkpoint."""
    precision, preset = KINDS[kind]
    scale = DynamicLossScale(2.0**18, growth_interval=3)  # overflows at first, and then now and again
    plugin = MasterWeightPrecision(precision, loss_scale=scale, **PRESETS[preset])  # type: ignore[arg-type]
    module = Classifier(mlp(width=16), configure)
    keeps = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    ours = trainer(plugin, max_epochs=EPOCHS, callbacks=[keeps], enable_checkpointing=True)
    ours.fit(
        module, Resumable(classification(EPOCH, size=8)), ckpt_path=ckpt, weights_only=None if ckpt is None else True
    )
    return module.losses, ours._checkpoint_connector.dump_checkpoint(weights_only=False)


def child(kind: str, folder: Path, stuck: Connection | None) -> None:
    """Train; with `stuck`, write half of the last.ckpt of the fifth step, say so, and wait to be killed."""
    tempfile.tempdir = str(folder.parent)
    written = 0
    write = LocalFileOpener.write

    def half(opener: Any, data: bytes) -> Any:
        nonlocal written
        written += opener.path.endswith("last.ckpt")
        if stuck is None or written < 5:
            return write(opener, data)
        write(opener, data[: len(data) // 2])
        opener.f.flush()
        stuck.send("half of it is written")
        time.sleep(PATIENCE)
        return None

    LocalFileOpener.write = half
    train(kind, folder)


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.001)


@pytest.fixture(params=["in a save", "at any time"])
def killed(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> Iterator[Path]:
    """The folder of a run that was killed."""
    folder, in_a_save = tmp_path / "killed", request.param == "in a save"
    receives, sends = processes.Pipe()
    process = processes.Process(target=child, args=(kind, folder, sends if in_a_save else None))
    process.start()
    if in_a_save:
        assert receives.poll(PATIENCE)
    else:
        wait_for(folder / "last.ckpt")
        time.sleep(random.uniform(0.0, 0.1))
    process.kill()
    process.join()
    yield folder
    process.close()
    for connection in (receives, sends):
        connection.close()


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_its_last_checkpoint(tmp_path: Path, kind: str, killed: Path) -> None:
    last = killed / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    whole_losses, whole = train(kind, tmp_path / "whole")
    losses, resumed = train(kind, tmp_path / "killed", last)
    assert step > 0
    assert losses == whole_losses[step:]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "MasterWeightPrecision"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
