"""What CUDA's kernels keep and make that a CPU's do not, each difference by its own rule.

Fake tensors are CPU tensors, so torch takes the CPU's way at every fork. `cuda_kernels` puts CUDA's in its place, for a
while, where memory depends on it: composite operations are registered anew for the keys that only such tensors have.
The rules follow torch's own sources, named beside each; none was measured on a GPU.

What stays unknown is said by `unknowns`, for the report's notes.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

aten = torch.ops.aten

BLOCK_BYTES = 512
"""What the caching allocator rounds up to (`kMinBlockSize`)."""
CUBLAS_WORKSPACE_BYTES = 2 * 32 * 2**20 + 2**20
"""Allocated once and kept: of cuBLAS on Hopper and later 32 MiB for each thread that uses it, which are forward's and
backward's (8.1 MiB each before); and cuBLASLt's (aten/src/ATen/cuda/CublasHandlePool.cpp; seen on an H100)."""
HALF = (torch.float16, torch.bfloat16)

AUTOCAST_TO_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss",
    "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
    "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
    "upsample_bicubic2d",
)  # fmt: skip
"""Operations whose inputs CUDA's autocast brings to FP32 (`AT_FORALL_FP32` of aten/src/ATen/autocast_mode.h)."""
AUTOCAST_FP32_RESULT = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList",
    "linalg_vector_norm",
)  # fmt: skip
"""Operations that it asks for an FP32 result, and that need no FP32 copy of their input for it
(`AT_FORALL_FP32_SET_OPT_DTYPE`)."""
AUTOCAST_TO_HALF = ("addmv", "addr", "mv", "prelu")
"""Operations that it brings to half and a CPU's autocast does not (`AT_FORALL_LOWER_PRECISION_FP`)."""

NOT_BY_CUDA_AUTOCAST = ("cross_entropy_loss",)
"""What a CPU's autocast brings to FP32 and CUDA's leaves as it is; its log-softmax then has its own rule."""


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Within it, operations on CPU tensors have the results, and keep for backward, what they would on CUDA."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        for name in ("softmax.int", "log_softmax.int"):
            library.impl(name, _softmax(name), "AutogradCPU")
        for names, rule in (
            (AUTOCAST_TO_FP32, _to_fp32),
            (AUTOCAST_FP32_RESULT, _with_fp32_result),
            (AUTOCAST_TO_HALF, _to_half),
        ):
            for name in names:
                if not _served_by_cpu_autocast(name):
                    library.impl(name, rule(_overload(name)), "AutocastCPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden
            for name in NOT_BY_CUDA_AUTOCAST:
                library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU", allow_override=True)
        yield


def cuda_optimizer(optimizer: Optimizer) -> None:
    """Choose what torch's optimizers choose on CUDA: the multi-tensor way, with temporaries as large as a group.

    A group that says `foreach` or `fused` itself is left as it is (torch/optim/optimizer.py,
    `_default_to_fused_or_foreach`).
    """
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused") and not group.get("differentiable"):
            group["foreach"] = True


def unknowns(module: nn.Module) -> list[str]:
    """What an estimate for CUDA leaves out, of this module."""
    notes = [
        "Estimated, not measured. Left out: the CUDA context, fragmentation and unsplit remainders of large blocks, "
        "what a kernel allocates and frees within itself, and memory of Triton and custom CUDA extensions.",
        f"cuBLAS's workspaces are counted as {CUBLAS_WORKSPACE_BYTES // 2**20} MiB, as on Hopper; older GPUs take 17.",
    ]
    parts = list(module.modules())
    if any(isinstance(part, nn.RNNBase) for part in parts):
        notes.append("Recurrent layers are counted as torch runs them step by step; what cuDNN keeps is not known.")
    if any(isinstance(part, nn.modules.conv._ConvNd) for part in parts):
        notes.append("cuDNN's workspaces for convolutions are not counted: it chooses them when it runs.")
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts):
        notes.append("cuDNN's reserve of batch norm is not counted.")
    return notes


# -- rules ------------------------------------------------------------------------------------------------------------


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Dropout keeps a mask of a byte an element, not noise in the input's type (aten/src/ATen/native/Dropout.cpp)."""
    if train and 0 < p < 1 and input.numel():
        return torch.native_dropout(input, p, train)[0]
    result: Tensor = aten.dropout.default.decompose(input, p, train)
    return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention for half without a mask, else the efficient kernel, else in plain operations.

    Both fused kernels keep their inputs, the output and an FP32 number for each query; no scores
    (aten/src/ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp).
    """
    width = query.shape[-1]
    fused = (
        query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and query.shape[0] == key.shape[0] == value.shape[0]
        and min(query.shape[-2], key.shape[-2]) > 0
    )
    same_heads = query.shape[1:2] == key.shape[1:2] == value.shape[1:2]
    square = not is_causal or query.shape[-2] == key.shape[-2]
    if (
        fused
        and query.dtype in HALF
        and attn_mask is None
        and width <= 256
        and width == key.shape[-1] == value.shape[-1]
        and (same_heads or enable_gqa)
        and square
    ):
        padded = [_padded(part, 8) for part in (query, key, value)]
        scale = width**-0.5 if scale is None else scale
        output: Tensor = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return output if output.shape[-1] == width else output[..., :width]
    bytes_of_width = width * query.element_size()
    if fused and same_heads and bytes_of_width % 16 == 0 and query.dtype in (*HALF, torch.float32):
        mask = None if attn_mask is None else _mask(attn_mask, query, key)
        needs_grad = any(part.requires_grad for part in (query, key, value)) and torch.is_grad_enabled()
        output, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, needs_grad, dropout_p, is_causal, scale=scale
        )
        return output
    mask = None if attn_mask is None else _as_bias(attn_mask, query.dtype)
    output, _ = aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return output


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor


def _mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the efficient kernel takes it: rows that begin on 16 bytes, expanded and not copied."""
    bias = _as_bias(mask, query.dtype)
    aligned = 16 // bias.element_size()
    if bias.shape[-1] % aligned:
        bias = _padded(bias, aligned)[..., : bias.shape[-1]]
    return bias.expand(*query.shape[:3], key.shape[-2])


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


class _SoftmaxToFP32(torch.autograd.Function):
    """Softmax of half into FP32 makes no FP32 copy of its input, and keeps its result (native/SoftMax.cpp).

    The numbers do not matter here, and torch's fake kernel takes float16 only.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.dtype = input.dtype
        result = torch.empty_like(input, dtype=torch.float32)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.empty_like(result, dtype=ctx.dtype)


def _softmax(name: str) -> Callable[..., Tensor]:
    composite = _overload(name)

    def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if input.dtype in HALF and dtype == torch.float32:
            return _SoftmaxToFP32.apply(input)
        result: Tensor = composite.decompose(input, dim, dtype)
        return result

    return softmax


def _to_fp32(operation: Any) -> Callable[..., Any]:
    """Inputs become FP32."""
    return _autocast(lambda args, kwargs: operation(*_cast(args, torch.float32), **_cast(kwargs, torch.float32)))


def _to_half(operation: Any) -> Callable[..., Any]:
    """Inputs become what autocast is for."""

    def run(args: Any, kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        return operation(*_cast(args, dtype), **_cast(kwargs, dtype))

    return _autocast(run)


def _with_fp32_result(operation: Any) -> Callable[..., Any]:
    """The result is FP32, unless the caller says what it is to be."""

    def run(args: Any, kwargs: Any) -> Any:
        takes = [argument.name for argument in operation._schema.arguments]
        given = kwargs.get("dtype") is not None or ("dtype" in takes[: len(args)] and args[takes.index("dtype")])
        if given or not isinstance(args[0], Tensor) or args[0].dtype not in HALF:
            return operation(*args, **kwargs)
        if "dtype" in takes[: len(args)]:
            args = args[: takes.index("dtype")]
        return operation(*args, **{**kwargs, "dtype": torch.float32})

    return _autocast(run)


def _autocast(run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return run(args, kwargs)

    return kernel


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also in lists, in `dtype`; float64 ones stay, as autocast leaves them."""
    if isinstance(values, Tensor):
        eligible = values.is_floating_point() and values.dtype != torch.float64
        return values.to(dtype) if eligible else values
    if isinstance(values, dict):
        return {name: _cast(value, dtype) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_cast(value, dtype) for value in values)
    return values


def _served_by_cpu_autocast(name: str) -> bool:
    """Whether a CPU's autocast has a rule for it: then it is the same one."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU")


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")
