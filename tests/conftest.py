"""Processes of `pytest -n` share the cores: each has its part of them, and so have the processes that it starts.

Without a GPU, the Triton kernels run on CPU tensors by Triton's interpreter.

Triton decides that for each function when it is defined, its own library's among them, so the variable is set while
all of Triton is imported, and only then: elsewhere in the tests CPU tensors are updated in plain torch.
"""

import importlib
import os
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from lightning_mpt.kernels import Kernel

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

if not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        # The second is loaded by the first launch otherwise.
        for module in ("lightning_mpt.kernels.triton", "triton.experimental.gluon"):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as missing:  # no wheel for this platform
                if not str(missing.name).startswith("triton"):
                    raise


@pytest.fixture
def triton_kernel() -> "Kernel":
    """Triton's kernel on CPU tensors, interpreted."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU the kernels are compiled for it, and tested there in test_cuda.py")
    from lightning_mpt.kernels.triton import TritonKernel

    return TritonKernel()


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest) -> "Kernel":
    """Either kernel."""
    from lightning_mpt.kernels.reference import ReferenceKernel

    made: Kernel = ReferenceKernel() if request.param == "reference" else request.getfixturevalue("triton_kernel")
    return made
