"""Processes of `pytest -n` share the cores: each has its part of them, and so have the processes that it starts.

Without a GPU, the Triton kernels run on CPU tensors by Triton's interpreter.

Triton decides that for each function when it is defined, its own library's among them, so the variable is set while
all of Triton is imported, and only then: elsewhere in the tests CPU tensors are updated in plain torch.
"""

import importlib
import os
from unittest import mock

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
