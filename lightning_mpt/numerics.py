"""FP32 where the paper wants it, inside a half-precision forward and backward: what torch can be told by switches.

Products are half, sums are FP32 (Micikevicius et al., arXiv 1710.03740, section 3.3). Kernels of softmax and of norms
take half and return half, and compute in FP32 in between: torch does so by itself. (On a CPU, LayerNorm keeps 1 / std
for backward in its input's type: with eps=1e-12, a constant row makes that inf in float16.) Matrix products add up in
FP32 unless a global switch lets them do otherwise. What functions must be given FP32 is in `fp32_functions.py`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

REDUCED_PRECISION_SWITCHES = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextmanager
def fp32_sums() -> Iterator[None]:
    """Within it no half matrix product may add up in half; the global switches are afterwards what they were."""
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    with ExitStack() as restore:
        for switch in REDUCED_PRECISION_SWITCHES:
            # Newer versions pair the switch with one for split-k, which is left alone.
            split_k = getattr(matmul, f"{switch}_split_k", None)
            before = getattr(matmul, switch)
            restore.callback(setattr, matmul, switch, before if split_k is None else (before, split_k))
            setattr(matmul, switch, False if split_k is None else (False, split_k))
        restore.callback(setattr, matmul, "allow_fp16_accumulation", matmul.allow_fp16_accumulation)
        matmul.allow_fp16_accumulation = False
        restore.callback(cuda.allow_fp16_bf16_reduction_math_sdp, cuda.fp16_bf16_reduction_math_sdp_allowed())
        cuda.allow_fp16_bf16_reduction_math_sdp(False)
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it new floating tensors are of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
