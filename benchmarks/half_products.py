"""Half-precision products at FP32's speed, on CPUs without instructions for them.

Where a CPU has none (AVX-512 BF16 or AMX on x86), torch's products in bf16 and fp16 are 5 to 30 times slower than in
FP32. What such a product *is* can be had from an FP32 one: a product of two half numbers is exact in FP32, sums are
FP32 in either, and the result is rounded to half. So operands are widened, multiplied, and rounded. Only the order of
the sums may differ, as it does between any two devices.

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
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
STATISTICS = {aten._scaled_dot_product_flash_attention_for_cpu.default: 1}
"""How many of an operator's results are half; the others are FP32 in any case. Not told: all."""


class HalfProducts(TorchDispatchMode):
    """Within it, products of half tensors on the CPU are computed in FP32 and rounded to half."""

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
        count = STATISTICS.get(func, len(result))
        return tuple(
            value.to(halves[0]) if index < count and isinstance(value, Tensor) else value
            for index, value in enumerate(result)
        )
