"""Half-precision products at FP32's speed, on CPUs without instructions for them.

Where a CPU has none (AVX-512 BF16 or AMX on x86), torch's products in bf16 and fp16 are 5 to 30 times slower than in
FP32. What such a product *is* can be had from an FP32 one: a product of two half numbers is exact in FP32, sums are
FP32 in either, and the result is rounded to half. So operands are widened, multiplied, and rounded. Only the order of
the sums may differ, as it does between any two devices.

An LSTM is one operator in FP32 and under autocast: inputs, weights and results are half, what is between them is FP32.
A half LSTM torch makes of small operators on such CPUs: the products are these, and every gate and cell state is
rounded to half, step by step.

It takes FP32 copies of the operands, so nothing that measures memory or time may use it: it is for the benchmarks that
ask how well a network trains.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mkldnn_rnn_layer.default,
    aten.mkldnn_rnn_layer_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
HALF_RESULTS = {aten._scaled_dot_product_flash_attention_for_cpu.default: 1, aten.mkldnn_rnn_layer.default: 3}
"""How many of an operator's results are half; the others, statistics and workspace, stay as they are. Not told: all."""


def native() -> bool:
    """Whether torch has fast products for this CPU in both bf16 and fp16. Where it cannot tell, yes."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except AttributeError:  # not built with oneDNN
        return True


class HalfProducts(TorchDispatchMode):
    """Within it, products of half tensors on the CPU are computed in FP32 and rounded to half."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and keeping torch.compile out takes longer than a small operator does."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        halves = [t.dtype for t in args if isinstance(t, Tensor) and t.dtype in HALF]
        if not halves:
            return func(*args, **kwargs)
        wide = tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, (args, kwargs))
        result = func(*wide[0], **wide[1])
        if isinstance(result, Tensor):
            return result.to(halves[0])
        count = HALF_RESULTS.get(func, len(result))
        return tuple(
            value.to(halves[0]) if index < count and isinstance(value, Tensor) else value
            for index, value in enumerate(result)
        )
