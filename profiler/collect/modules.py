"""Which modules Python sees run, and how long each of them took."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from ..figures import ModuleForward
from .tensors import parts_of, tensors_in

Hook = TypeVar("Hook", bound=Callable[..., Any])

OUTPUT_DEPTH = 3
"""How deep outputs are searched for tensors: a tensor in a list in a dictionary is found."""

NAMED = 5
"""How many modules a note names."""


class ModuleForwards:
    """The forward passes of every module: how many, the time they took, the size of what they gave."""

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}  # path -> calls, nanoseconds, bytes of the largest call's outputs

    def add(self, path: str, time_ns: int, output: object) -> None:
        """The module at `path` ran for `time_ns`, its children included, and gave `output`."""
        if type(output) is torch.Tensor and output.layout is torch.strided:  # nearly always, and cheaper so
            size = output.nbytes
        else:
            size = sum({id(tensor): _bytes(tensor) for tensor in tensors_in(output, OUTPUT_DEPTH)}.values())
        sums = self._of.setdefault(path, [0, 0, 0])
        sums[0] += 1
        sums[1] += time_ns
        sums[2] = max(sums[2], size)

    def by_path(self) -> dict[str, ModuleForward]:
        """What was added, by module path."""
        return {path: ModuleForward(*sums) for path, sums in self._of.items()}


def _bytes(tensor: torch.Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def hookable(root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules whose forward pass Python sees: not those inside a compiled or scripted one."""
    hidden: set[torch.nn.Module] = set()
    for path, module in root.named_modules():
        if module in hidden or isinstance(module, torch.jit.ScriptModule):
            hidden.update(module.children())
            continue
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            hidden.update(module.children())
        if module._compiled_call_impl is None:
            yield path, module


def untracer(root: torch.nn.Module) -> Callable[[Hook], Hook]:
    """What to put round the hooks that autograd calls, so that torch.compile does not trace and compile them.

    It would do so with those called while a compiled module runs. Where nothing is compiled the hooks stay as they are:
    putting something round costs a microsecond a call. A compiled function that is no module is known by what was
    compiled before.
    """
    compiles = bool(_compiled(root)) or bool(torch._dynamo.utils.counters["frames"]["total"])
    return torch._dynamo.disable if compiles else _as_it_is


def compiled_note(root: torch.nn.Module) -> str | None:
    """A sentence that names the modules whose insides torch.compile runs as one; None where there are none."""
    paths = [path or "the module itself" for path in _compiled(root)]
    if not paths:
        return None
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return (
        f"Under torch.compile, what happens inside these modules is not told apart: {', '.join(paths[:NAMED])}{more}."
    )


def _compiled(root: torch.nn.Module) -> list[str]:
    return [
        path
        for path, module in root.named_modules()
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
    ]


def _as_it_is(hook: Hook) -> Hook:
    return hook


def parameter_paths(
    module: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[torch.nn.Parameter, str | None]:
    """Each parameter's module, by path: the first one where it is tied, None where only an optimizer has it."""
    paths: dict[torch.nn.Parameter, str | None] = {}
    for path, part in module.named_modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                paths.setdefault(parameter, path)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                paths.setdefault(parameter, None)
    return paths
