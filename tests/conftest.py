"""Without a GPU, the Triton kernels run on CPU tensors by Triton's interpreter.

Triton decides that for each function when it is defined, its own library's among them, so the variable is set while
all of Triton is imported, and only then: elsewhere in the tests CPU tensors are updated in plain torch.
"""

import importlib
import os
from unittest import mock

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
