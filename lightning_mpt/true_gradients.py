"""True gradients for whoever asks between backward and the step, and nothing for the others.

Backward leaves gradients of the scaled loss, half as a rule, and the update unscales them in FP32 as it reads them. Who
looks at them in between would see them scaled. Within `true_gradients`, reading `parameter.grad` gives the true
gradient in FP32, made at that moment: what is not asked for costs nothing, and nothing waits for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .base import refuse_sparse
from .conversion import ConvertedModule
from .kernels.gradients import scan_gradients, true_gradient
from .kernels.slots import GradientTransform
from .shards import layout, local

_READ, _WRITE, _DELETE = (getattr(Tensor.grad, name) for name in ("__get__", "__set__", "__delete__"))
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


@contextmanager
def true_gradients(converted: ConvertedModule, scale: Tensor, *, scaled: bool = True) -> Iterator[list[Tensor]]:
    """Within it, `parameter.grad` of the module's parameters is the true gradient: float32, unscaled.

    What is done to it in place, or assigned instead of it, is done to the gradient: afterwards the parameter has the
    changed one, float32 and scaled, and is in the list that is given. A gradient that was only read is afterwards what
    it was; a sharded one is taken to be changed. Under a loss scale, one that overflowed stays so, whatever was made of
    it: the step is to be skipped, and the scale to fall.

    Args:
        converted: the module; its gradients may change.
        scale: the loss scale that backward used: float32 without dimensions.
        scaled: whether there is a loss scale, and not the constant 1.

    Raises:
        RuntimeError: a gradient that is asked for is sparse.
    """
    mode = _TrueGradients(converted, scale)
    assigned: list[Tensor] = []
    with mode:
        yield assigned
    for parameter, true in mode.changed():
        changed = true.detach().float() * scale.to(true.device, non_blocking=True)
        if scaled and parameter.grad is not None and parameter.grad.numel():
            found_inf, _ = scan_gradients([local(parameter.grad)], norm=False)
            local(changed).add_(torch.where(found_inf > 0, torch.nan, 0.0))
        converted.give_gradient(parameter, changed)
        assigned.append(parameter)


class _TrueGradients(TorchFunctionMode):
    """Reading and writing the attribute `grad` comes by here, as all functions of torch do."""

    def __init__(self, converted: ConvertedModule, scale: Tensor) -> None:
        super().__init__()
        self._converted, self._scale = converted, scale
        self._true: dict[Tensor, Tensor] = {}
        """The gradients that were asked for, or assigned."""
        self._versions: dict[Tensor, int] = {}
        """Of those made here, the version that they were made with; none of a DTensor, which counts no writes to it."""

    def changed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters whose true gradient was written to or assigned, with it."""
        return ((p, true) for p, true in self._true.items() if true._version != self._versions.get(true))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _READ and args[0] in self._parameters:
            return self._read(args[0])
        if func == _DATA and args[0] in self._versions:
            return args[0].detach()  # the same memory, and a write to it is seen
        if func in (_WRITE, _DELETE) and args[0] in self._parameters:
            self._true.pop(args[0], None)
            if func == _WRITE and isinstance(args[1], Tensor):
                self._true[args[0]] = args[1]
                return None
        return func(*args, **(kwargs or {}))

    @cached_property
    def _parameters(self) -> set[Tensor]:
        return set(self._converted.module.parameters())

    @torch.no_grad()
    def _read(self, parameter: Tensor) -> Tensor | None:
        gradient = parameter.grad
        if parameter not in self._true and gradient is not None:
            refuse_sparse([gradient])
            unscale = GradientTransform(self._scale.to(gradient.device, non_blocking=True).reciprocal())
            true = true_gradient(gradient, unscale, torch.empty_like(gradient, dtype=torch.float32))
            self._true[parameter] = true
            if layout(true) is None:
                self._versions[true] = true._version
        return self._true.get(parameter)
