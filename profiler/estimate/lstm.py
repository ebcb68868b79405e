"""oneDNN's LSTM on a CPU: what it keeps for backward, which torch's fake kernel leaves out, and its scratch.

oneDNN lays the rows of its matrices out on 64 bytes, away from multiples of 256 numbers, and the parts of its workspace
on pages (src/cpu/rnn/rnn_utils.cpp: `get_good_ld`, `set_offsets`). The sizes were read off layers of some three hundred
shapes on a CPU without AVX-512 and of seventy on one with AMX, where half layers take the same way; the workspace fits
every one to the byte, the scratch of half layers within some 100 KiB. Another CPU may get another implementation: there
the rule is asked whether it fits a small layer, and not used where it does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

_FORWARD = aten.mkldnn_rnn_layer.default
_BACKWARD = aten.mkldnn_rnn_layer_backward.default
_PAGE = 4096
_SINGLE = 4
"""Bytes of an FP32 number, which sums are in half layers too."""
_POINTERS = 568
"""Bytes, of addresses and alignment, in its scratch."""


def rule_holds() -> bool:
    """Whether LSTMs may be counted as oneDNN runs them: it takes part, and keeps what the rule says."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled() and _fits()


@cache
def _fits() -> bool:
    half = [torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    return all(_fits_layer(dtype) for dtype in (torch.float32, *half))


def _fits_layer(dtype: torch.dtype) -> bool:
    with _disable_current_modes(), torch.enable_grad():  # else nothing is kept
        input, w0, w1, bias, state = (
            torch.zeros(shape, dtype=dtype, device="cpu") for shape in ((3, 5, 33), (80, 33), (80, 20), (80,), (5, 20))
        )
        states_and_options: tuple[Any, ...] = state, state, False, [], 2, 20, 1, True, False, False, True
        arguments: tuple[Any, ...] = (input, w0, w1, bias, bias, *states_and_options)
        kept: torch.Tensor = _FORWARD(*arguments)[3]
        return kept.nbytes == _workspace_bytes(*_sizes(arguments), dtype.itemsize)


def lstm_unknowns(module: nn.Module) -> list[str]:
    """What an estimate for a CPU leaves out, of this module."""
    if not has_lstm(module) or rule_holds():
        return []
    return [
        "LSTMs are counted as torch runs them without oneDNN (torch.backends.mkldnn.enabled = False): with it they "
        "keep a workspace that takes two to three times as much."
    ]


def has_lstm(module: nn.Module) -> bool:
    """Whether oneDNN could take part, whose fake LSTM forgets its workspace."""
    return any(isinstance(part, nn.LSTM) for part in module.modules())


@contextmanager
def without_onednn() -> Iterator[None]:
    """Within it torch does without oneDNN. (`torch.backends.mkldnn.flags` would write to other switches too.)"""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def with_workspace(func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
    """The result of an operation; of an LSTM's layer that goes backward, with a workspace of the size it would have.

    Its gradients are FP32 whatever the layer is, which torch 2.11's fake kernel does not know.
    """
    if func is _BACKWARD:
        return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in result)
    if func is not _FORWARD or not torch.is_grad_enabled():
        return result
    *outputs, _ = result
    size = _workspace_bytes(*_sizes(args), args[0].element_size())
    return (*outputs, args[0].new_empty(size, dtype=torch.uint8))


def lstm_scratch(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Bytes that a layer has beside its results: weights in its own layout, and sums of gates. 0 for all else."""
    if func is not _FORWARD and func is not _BACKWARD:
        return 0
    steps, batch, inputs, hidden = _sizes(args)
    gates, number = 4 * hidden, args[0].element_size()
    backward = func is _BACKWARD
    if number != _SINGLE:
        scratch = number * (gates + (inputs + hidden) * gates) + (_SINGLE + number) * batch * _row(gates)
        if backward:  # half results are cast to FP32, and what is summed over the steps is laid out in rows
            scratch += _SINGLE * ((steps + 2) * batch * hidden + (inputs + hidden) * _row(gates) + gates)
        return scratch
    sums = _pages(steps * batch * _row(gates)) + 2 * _pages(batch * _row(hidden)) + _PAGE + _POINTERS
    scratch = sums + _SINGLE * (gates + (inputs + hidden) * _row(gates))
    if backward:
        scratch += _SINGLE * (gates + 2 * batch * hidden)
        scratch += sum(_SINGLE * gates * _row(size) for size in (inputs, hidden) if size != _row(size))
        gradient = args[10]
        if gradient is not None and not gradient.is_contiguous():
            scratch += gradient.nbytes
    return scratch


def _sizes(args: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """Steps, samples, inputs, hidden units of a layer.

    Steps come first whatever its argument `batch_first` says: `mkldnn_rnn` has transposed the input by then, and hands
    the flag on (aten/src/ATen/native/mkldnn/RNN.cpp).
    """
    input, w1 = args[0], args[2]
    return (*input.shape, w1.shape[1])


def _workspace_bytes(steps: int, batch: int, inputs: int, hidden: int, number: int) -> int:
    """`number` is the bytes of one of the layer's: gates and states are of its type, gradients and cells of FP32."""
    states, widest = 2 * (steps + 1) * batch, max(inputs, hidden)
    return (
        _pages(steps * batch * _row(4 * hidden, number), number)
        + _pages(states * _row(widest, number), number)
        + 2 * _pages(states * _row(widest))
        + _pages(states * hidden, number)
        + _pages(states * hidden)
        + _pages(steps * batch * _row(hidden, number), number)
    )


def _row(numbers: int, number: int = _SINGLE) -> int:
    """How many numbers of `number` bytes a row of so many has room for."""
    line = 64 // number
    rounded = -(-numbers // line) * line
    return rounded + line if rounded % 256 == 0 else rounded


def _pages(numbers: int, number: int = _SINGLE) -> int:
    """Bytes of the whole pages that hold so many numbers of `number` bytes."""
    return -(-numbers * number // _PAGE) * _PAGE
