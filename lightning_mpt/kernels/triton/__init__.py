"""The update as one kernel launch for all parameters: `formats.py` loads and stores, `update.py` and `scan.py` compute,
`launch.py` tells them where the tensors are. And `cross_entropy.py`. The only place that imports Triton.

With `TRITON_INTERPRET=1` in the environment, set before the import, the same kernels run on CPU tensors.
"""

from .cross_entropy import TritonCrossEntropy
from .launch import TritonKernel

__all__ = ["TritonCrossEntropy", "TritonKernel"]
