"""Functions of torch's that compute in FP32 where they are given half, and how.

Losses, sums over a whole batch that no later rounding should touch, would be computed in the type of the logits: they
are given FP32 ones (Micikevicius et al., arXiv 1710.03740, section 3.3). Linear algebra, as orthogonal weights and
flows have it, has no half kernels, and a matrix exponential in half is NaN on a CPU: it is given FP32 too. So are
distances, quantiles and Fourier transforms, which have half kernels on some devices and for some shapes. The sum of all
elements of a tensor, as losses written by hand have it, is an FP32 number.

Further functions are called in another way where half has no room for a number (`half_range.py`), or where FP32 tensors
meet half ones (`mixed_types.py`).
"""

import warnings
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from . import half_range, mixed_types
from .cross_entropy import instead_of_torchs
from .storage import HALF_DTYPES, fp32_to, half_to_fp32
from .torch_functions import Function, Way, named
from .upcast import Casts, before_call

LOSSES = frozenset(
    {
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cosine_embedding_loss,
        F.cross_entropy,
        F.ctc_loss,
        F.gaussian_nll_loss,
        F.hinge_embedding_loss,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.margin_ranking_loss,
        F.mse_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.nll_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
    }
)
"""What `torch.nn.functional` calls losses; the modules of `torch.nn` call these."""


DETERMINANTS = named("det logdet slogdet cond")
"""Numbers, which become part of a loss and stay FP32."""

SUMS = named("sum")
"""Of a whole tensor, numbers too: of many elements, beyond float16's range before a loss divides them."""

FACTORIZATIONS = named(
    "cholesky cholesky_ex cholesky_inverse cholesky_solve eig eigh eigvals eigvalsh geqrf householder_product inv "
    "inv_ex inverse ldl_factor ldl_factor_ex ldl_solve lstsq lu lu_factor lu_factor_ex lu_solve matrix_exp matrix_rank "
    "orgqr ormqr pca_lowrank pinv pinverse qr solve solve_ex solve_triangular svd svd_lowrank svdvals tensorinv "
    "tensorsolve triangular_solve"
)
"""Matrices, which go on in half."""

FOURIER = frozenset(
    getattr(torch.fft, direction + way)
    for direction in ("", "i")
    for way in ("fft", "fft2", "fftn", "rfft", "rfft2", "rfftn", "hfft", "hfft2", "hfftn")
) | named("stft istft")
"""Complex numbers of FP32 parts, or real ones of such."""

THROUGH_FP32 = FACTORIZATIONS | FOURIER | named("cdist pdist quantile nanquantile histc")
"""What is computed in FP32 where it is given half, and goes on in half; transforms back of a spectrum too."""

CASTS = frozenset({Tensor.float, Tensor.to, Tensor.type})
"""How callers bring logits to FP32 themselves."""


class FP32Functions(TorchFunctionMode):
    """Within it, losses, linear algebra, distances and Fourier transforms compute in FP32 where they are given half.

    Cross entropy over many classes is computed in FP32 without an FP32 copy of all logits (`cross_entropy.py`), also
    where the caller brings them to FP32: a vocabulary's copy waits until something needs it (`upcast.py`).

    Args:
        casts: what decides about the callers' casts, and learns from each.
    """

    def __init__(self, casts: Casts | None = None) -> None:
        super().__init__()
        self._casts = casts or Casts()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            before_call(func, args, kwargs)
            if func in CASTS:
                return self._casts.cast(func, args, kwargs)
        way = WAYS.get(func)
        return func(*args, **kwargs) if way is None else way(func, args, kwargs)


def _in_fp32(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives for half tensors, computed in FP32; it stays FP32."""
    return func(*map(half_to_fp32, args), **{name: half_to_fp32(value) for name, value in kwargs.items()})


def _through_fp32(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives for half tensors, computed in FP32 and rounded."""
    given = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    if func in FOURIER and torch.complex64 in given and torch.float32 not in given:  # a half spectrum, on its way back
        given.add(torch.get_default_dtype())
    half = given & set(HALF_DTYPES)
    if not half:
        return func(*args, **kwargs)
    args, kwargs = tree_map(half_to_fp32, (args, kwargs))
    return tree_map(partial(fp32_to, half.pop()), func(*args, **kwargs))


def _cross_entropy(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    loss = instead_of_torchs(*args, **kwargs)
    return _in_fp32(func, args, kwargs) if loss is None else loss


def _of_probabilities(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    probabilities = args[0] if args else kwargs["input"]
    if probabilities.dtype in HALF_DTYPES and not torch.compiler.is_compiling():
        warn_of_probabilities()
    return _in_fp32(func, args, kwargs)


@cache
def warn_of_probabilities() -> None:
    """Warn, once: each step would say the same."""
    warnings.warn(
        "binary_cross_entropy was given probabilities in half precision. From 0.998 on they are 1 in bfloat16, from "
        "0.9998 on in float16, and one that is wrong there has no gradient: leave the sigmoid away, and use "
        "binary_cross_entropy_with_logits (BCEWithLogitsLoss).",
        stacklevel=2,
    )


def _sum(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    whole = len(args) == 1 and not kwargs and args[0].dtype in HALF_DTYPES and not _one_of_a_batch(args[0])
    return func(*args, dtype=torch.float32) if whole else func(*args, **kwargs)


def _one_of_a_batch(x: Tensor) -> bool:
    """Whether `x` is one of many that `torch.vmap` takes at once: then its sum is one of a tensor's elements."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


WAYS: dict[Any, Way] = {
    **dict.fromkeys(LOSSES | DETERMINANTS, _in_fp32),
    **dict.fromkeys(THROUGH_FP32, _through_fp32),
    **dict.fromkeys(SUMS, _sum),
    **half_range.WAYS,
    **mixed_types.WAYS,
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy: _of_probabilities,
}
"""How each function is called within the mode."""
