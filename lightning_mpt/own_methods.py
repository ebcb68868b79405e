"""What a class of optimizers has beside what every optimizer has, and whether that reads gradients.

`train` and `eval` of schedule-free optimizers, SAM's `first_step` and `second_step`, Sophia's `update_hessian`.
"""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch.optim import Optimizer

GRADIENTS = frozenset({"grad", "clip_grad_norm_", "clip_grad_value_", "zero_grad", "step"})
"""Names in the code of what reads gradients or lets go of them. A step, of an optimizer inside too, reads them."""


def own_methods(kind: type[Optimizer]) -> dict[str, Callable[..., Any]]:
    """The public methods of a class that `torch.optim.Optimizer` has not, by their names."""
    names = [name for name in dir(kind) if not name.startswith("_") and not hasattr(Optimizer, name)]
    found = {name: inspect.getattr_static(kind, name) for name in names}
    return {name: method for name, method in found.items() if inspect.isfunction(method)}


def reads_gradients(kind: type[Optimizer], method: Callable[..., Any]) -> bool:
    """Whether a method names gradients in its code, or in that of a helper in its class or its package.

    More often than it does read them, sooner than less often.
    """
    package = method.__module__.partition(".")[0]
    to_look_at, seen = [method], set()
    while to_look_at:
        function: Any = inspect.unwrap(to_look_at.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = set(_names(code))
        if names & GRADIENTS:
            return True
        for name in names:
            if not hasattr(Optimizer, name):
                to_look_at += [vars(base)[name] for base in kind.__mro__ if inspect.isfunction(vars(base).get(name))]
            helper = function.__globals__.get(name)
            if inspect.isfunction(helper) and helper.__module__.partition(".")[0] == package:
                to_look_at.append(helper)
    return False


def _names(code: CodeType) -> Iterator[str]:
    """All names in it that are not of local variables."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif constant == "grad":  # getattr(parameter, "grad")
            yield constant
