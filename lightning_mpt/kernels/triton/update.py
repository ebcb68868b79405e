"""The update kernel: unscale, clip, AdamW and rounding of one tile, read once and written once.

The rule is that of `kernels/reference.py`; a program updates `BLOCK` elements of one parameter, and the table says
where they are. Whether anything is to change (`found_inf`), by how much to divide (`multiplier`), the learning rate and
the step are read on the device.
"""

import triton
import triton.language as tl

from ...storage import dither
from .tile import load, offsets_of

FIELDS = tl.constexpr(10)
"""Numbers that the table has for each parameter, in this order."""
WEIGHT = tl.constexpr(0)
MASTER = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SCALE = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)
EXP_AVG_SQ_SCALE = tl.constexpr(5)
MAXIMUM = tl.constexpr(6)
MAXIMUM_SCALE = tl.constexpr(7)
STEP = tl.constexpr(8)
NUMEL = tl.constexpr(9)

INDEX_STRIDE = tl.constexpr(dither.INDEX_STRIDE)
STEP_STRIDE = tl.constexpr(dither.STEP_STRIDE)
STREAM_STRIDE = tl.constexpr(dither.STREAM_STRIDE)


@triton.jit
def adamw_kernel(
    table,
    gradients,
    owners,
    numbers,
    found_inf,
    found_stride,
    multiplier_tensor,
    multiplier,
    lr_tensor,
    lr,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    clip_value,
    HALF: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOAD_MASTER: tl.constexpr,
    STORE_MASTER: tl.constexpr,
    LOAD_MOMENT: tl.constexpr,
    STORE_MOMENT: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CLIP: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Update one tile in place.

    `table` (int64) has FIELDS numbers for each parameter: addresses, 0 where there is nothing, and its size.
    `gradients` (int64) has their addresses. Program i works on tile `numbers[i]` of parameter `owners[i]` (int32).
    Where a tile ends its parameter, or an address is odd, it is done in steps of `TAIL` elements.
    `multiplier_tensor` and `lr_tensor` are float32 without dimensions, or None. So is `found_inf` where `found_stride`
    is 0; where that is 1, it has a number for each parameter.
    """
    owner = tl.load(owners + tl.program_id(0))
    changes = True
    if found_inf is not None:
        changes = tl.load(found_inf + owner * found_stride) == 0
    if changes:
        if multiplier_tensor is not None:
            multiplier = tl.load(multiplier_tensor)
        if lr_tensor is not None:
            lr = tl.load(lr_tensor)
        start = tl.load(numbers + tl.program_id(0)).to(tl.int64) * BLOCK
        entry = table + owner * FIELDS
        gradient = tl.load(gradients + owner)
        weight = tl.load(entry + WEIGHT)
        master = tl.load(entry + MASTER)
        exp_avg = tl.load(entry + EXP_AVG)
        exp_avg_scale = tl.load(entry + EXP_AVG_SCALE)
        exp_avg_sq = tl.load(entry + EXP_AVG_SQ)
        exp_avg_sq_scale = tl.load(entry + EXP_AVG_SQ_SCALE)
        maximum = tl.load(entry + MAXIMUM)
        maximum_scale = tl.load(entry + MAXIMUM_SCALE)
        numel = tl.load(entry + NUMEL)
        step = tl.load(tl.load(entry + STEP).to(tl.pointer_type(tl.float32)))
        aligned = (weight | gradient | master | exp_avg | exp_avg_sq | maximum) % 16 == 0
        shrink = lr * weight_decay if DECOUPLED else weight_decay
        step_size = lr / _one_minus_exp(step * log_beta1)
        root2 = tl.sqrt(_one_minus_exp(step * log_beta2))
        # Two copies of the same lines: a mask by an odd length, or an odd address, moves an element at a time.
        if aligned & (start + BLOCK <= numel):
            _update(
                weight, gradient, master, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, maximum, maximum_scale,
                step, numel, start, multiplier, clip_value, shrink, one_minus_beta1, beta2, one_minus_beta2,
                step_size, root2, eps, HALF, GRADIENT, LOAD_MASTER, STORE_MASTER, LOAD_MOMENT, STORE_MOMENT,
                AMSGRAD, CLIP, DECOUPLED, MAXIMIZE, BLOCK, True,
            )  # fmt: skip
        else:
            # In small steps, so that this path needs no more registers than the other, and short tensors few steps.
            for part in range(start, tl.minimum(start + BLOCK, numel), TAIL):
                _update(
                    weight, gradient, master, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, maximum,
                    maximum_scale, step, numel, part, multiplier, clip_value, shrink, one_minus_beta1, beta2,
                    one_minus_beta2, step_size, root2, eps, HALF, GRADIENT, LOAD_MASTER, STORE_MASTER,
                    LOAD_MOMENT, STORE_MOMENT, AMSGRAD, CLIP, DECOUPLED, MAXIMIZE, TAIL, False,
                )  # fmt: skip


@triton.jit
def _update(
    weight, gradient, master, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, maximum, maximum_scale,
    step, numel, start, multiplier, clip_value, shrink, one_minus_beta1, beta2, one_minus_beta2, step_size, root2, eps,
    HALF: tl.constexpr, GRADIENT: tl.constexpr,
    LOAD_MASTER: tl.constexpr, STORE_MASTER: tl.constexpr, LOAD_MOMENT: tl.constexpr, STORE_MOMENT: tl.constexpr,
    AMSGRAD: tl.constexpr, CLIP: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    offsets = offsets_of(BLOCK)
    mask = start + offsets < numel
    g = load(gradient, start, offsets, mask, GRADIENT, WHOLE).to(tl.float32) * multiplier
    w = LOAD_MASTER(weight, master, start, offsets, mask, HALF, WHOLE)
    m = LOAD_MOMENT(exp_avg, exp_avg_scale, start, offsets, mask, numel, True, WHOLE)
    v = LOAD_MOMENT(exp_avg_sq, exp_avg_sq_scale, start, offsets, mask, numel, False, WHOLE)
    if CLIP:
        g = tl.minimum(tl.maximum(g, -clip_value), clip_value)
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        w -= shrink * w
    else:
        g += shrink * w
    m += (g - m) * one_minus_beta1
    v = beta2 * v + one_minus_beta2 * g * g
    largest = v
    if AMSGRAD:
        largest = LOAD_MOMENT(maximum, maximum_scale, start, offsets, mask, numel, False, WHOLE)
        largest = tl.maximum(largest, v)
    w -= step_size * (m / (tl.sqrt(largest) / root2 + eps))
    bits = _dither(start, offsets, step)
    STORE_MASTER(w, weight, master, start, offsets, mask, bits, HALF, WHOLE)
    bits += STREAM_STRIDE
    STORE_MOMENT(m, exp_avg, exp_avg_scale, start, offsets, mask, numel, bits, True, WHOLE)
    bits += STREAM_STRIDE
    STORE_MOMENT(v, exp_avg_sq, exp_avg_sq_scale, start, offsets, mask, numel, bits, False, WHOLE)
    if AMSGRAD:
        bits += STREAM_STRIDE
        STORE_MOMENT(largest, maximum, maximum_scale, start, offsets, mask, numel, bits, False, WHOLE)


@triton.jit
def _dither(start, offsets, step):
    """The dither of each element (`storage/dither.py`), uint32. Wraps on purpose."""
    first = (start % 4294967296) * (INDEX_STRIDE % 65536) + (((start % 65536) * (INDEX_STRIDE // 65536)) << 16)
    base = ((first + step.to(tl.int64) * STEP_STRIDE) % 4294967296).to(tl.uint32)
    return offsets.to(tl.uint32) * INDEX_STRIDE + base


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, with FP32's relative precision where x is small: there as a series."""
    series = 1.0 + x / 9.0
    series = 1.0 + x / 8.0 * series
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.3, -x * series, 1.0 - tl.exp(x))
