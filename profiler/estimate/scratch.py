"""What kernels of a CPU allocate and free within themselves, where that is large: convolutions, batch norm, LSTMs.

- oneDNN works on blocked layouts: it copies its inputs to them, and its result back, of a half type by way of a second
  copy (aten/src/ATen/native/mkldnn/Conv.cpp). Half gradients of weights are summed in FP32, by each thread for itself.
- Without it, which is so for half types on CPUs without instructions for them, the input is unfolded into columns, one
  for every element of a filter (aten/src/ATen/native/ConvolutionMM2d.cpp).
- Batch norm's backward pass makes a second tensor of its input's size (aten/src/ATen/native/Normalization.cpp).

Read off the allocations that such kernels make under `torch.profiler`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .lstm import lstm_scratch, lstm_unknowns

aten = torch.ops.aten
_CONVOLUTIONS = {aten.convolution.default: 6, aten.convolution_backward.default: 7}
"""With the place of their argument `transposed`."""
BLOCKS_BYTES = 90_000
"""What a thread keeps half blocks in, more or less: 80 to 180 KB."""


def cpu_scratch(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the kernel has at once beside its result; 0 where it needs none, or little."""
    if func is aten.native_batch_norm_backward.default:
        return int(args[1].nbytes) if args[0].is_contiguous() else 0
    if func in _CONVOLUTIONS and args[_CONVOLUTIONS[func]]:  # transposed
        return 0
    if func is aten.convolution.default:
        image, weight = args[0], args[1]
        if _by_onednn(image):
            copies = 1 if image.dtype == torch.float32 else 2
            return max(image.nbytes + weight.nbytes, copies * _result_bytes(image, weight, args))
        return _columns_bytes(image, weight, _result_size(image, weight, args))
    if func is aten.convolution_backward.default:
        gradient, image, weight = args[:3]
        if _by_onednn(image):
            copies = gradient.nbytes + image.nbytes
            if image.dtype != torch.float32:
                copies += torch.get_num_threads() * (4 * weight.numel() + BLOCKS_BYTES)
            return int(copies)
        return _columns_bytes(image, weight, gradient.shape[2:])
    return lstm_scratch(func, args)


def cpu_unknowns(module: nn.Module) -> list[str]:
    """What an estimate for a CPU leaves out, of this module."""
    notes = lstm_unknowns(module)
    convolutions = [part for part in module.modules() if isinstance(part, nn.modules.conv._ConvNd)]
    if any(part.transposed or math.prod(part.kernel_size) == 1 for part in convolutions):
        notes.append(
            "Convolutions of one pixel are counted with copies to oneDNN's layouts, which CPUs without AVX-512 do not "
            "make, and transposed ones without: of a net of such layers the peak may be told up to 1.6 times too high, "
            "or 6 % too low."
        )
    return notes


def _by_onednn(image: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch._C._get_mkldnn_enabled():
        return False
    if image.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if image.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return image.dtype == torch.float32


def _columns_bytes(image: Tensor, weight: Tensor, result_size: Any) -> int:
    if math.prod(weight.shape[2:]) == 1:
        return 0
    return int(len(image) * math.prod(weight.shape[1:]) * math.prod(result_size) * image.element_size())


def _result_size(image: Tensor, weight: Tensor, args: tuple[Any, ...]) -> list[int]:
    _, _, _, stride, padding, dilation = args[:6]
    sizes = []
    for axis, size in enumerate(image.shape[2:]):
        reach = _at(dilation, axis) * (weight.shape[2 + axis] - 1) + 1
        sizes.append((size + 2 * _at(padding, axis) - reach) // _at(stride, axis) + 1)
    return sizes


def _result_bytes(image: Tensor, weight: Tensor, args: tuple[Any, ...]) -> int:
    return int(len(image) * len(weight) * math.prod(_result_size(image, weight, args)) * image.element_size())


def _at(values: Any, axis: int) -> int:
    return int(values[axis] if len(values) > 1 else values[0])
