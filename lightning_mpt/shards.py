"""Parameters that are sharded over processes (DTensors: FSDP2's `fully_shard`, tensor parallelism).

Every element's update needs that element alone, so all arithmetic and all storage is on what this process holds, and
only what is told of *all* gradients goes over the wire: whether one is not finite, and their norm. Seen from outside,
masters and optimizer state are DTensors again, laid out as their parameter.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PLAIN = frozenset((Tensor, nn.Parameter))
"""What is certainly no DTensor."""


class Layout(NamedTuple):
    """How a tensor is spread: a device mesh and a placement for each of its dimensions."""

    mesh: Any
    placements: tuple[Any, ...]


def layout(tensor: Tensor) -> Layout | None:
    """A DTensor's layout, None of any other tensor."""
    if type(tensor) in PLAIN:  # the usual case, without looking for what they have not
        return None
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else Layout(mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: all of it unless it is a DTensor."""
    if layout(tensor) is None:
        return tensor
    with torch.no_grad():
        held: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return held


def sharded_like(value: Tensor, pattern: Tensor) -> Tensor:
    """`value`, of the shape of what this process holds of `pattern`, as the DTensor that it is a part of."""
    spread = layout(pattern)
    if spread is None:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, *spread, run_check=False, shape=pattern.shape, stride=pattern.stride())


def share(value: Tensor, pattern: Tensor) -> Tensor:
    """What this process is to hold of `value`, which is whole here and of the shape of `pattern`."""
    spread = layout(pattern)
    if spread is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(value.to(pattern.device), *spread, src_data_rank=None))


def written(parameter: Tensor) -> None:
    """Let a DTensor's version count a write to what this process holds of it; that of any other tensor does already."""
    if layout(parameter) is not None:
        torch.autograd.graph.increment_version(parameter)


def replace(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter other values, perhaps of another dtype; it stays the same object."""
    if layout(parameter) is None:
        parameter.data = value
    else:  # `data` would change what torch knows of a DTensor, not what it holds
        torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))


def found_anywhere(found_inf: Tensor, spreads: Iterable[Layout | None]) -> Tensor:
    """Whether something was found in any process that has a part in these layouts.

    Args:
        found_inf: float32, no dimensions; 1 if an element of any layout is not finite here. Not changed.
        spreads: the layouts of all gradients. Every process must give them in the same order.
    """
    for mesh in dict.fromkeys(spread.mesh for spread in spreads if spread is not None):
        found_inf = found_inf.clone()
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, group)
    return found_inf


def norm_over_shards(norm: Tensor, spread: Layout | None) -> Tensor:
    """The Euclidean norm of whole tensors of one layout, from that of what this process holds of them (not changed)."""
    if spread is None:
        return norm
    squares = norm.square()
    for dimension, placement in enumerate(spread.placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(squares, group=spread.mesh.get_group(dimension))
    return squares.sqrt()


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    return not PLAIN.issuperset(map(type, tensors)) and any(layout(tensor) is not None for tensor in tensors)


def sharded_groups(module: nn.Module) -> dict[tuple[str, ...], dict[str, nn.Parameter]]:
    """Which parameters `fully_shard` gathers and reduces together, by the names of the modules that it was given.

    Those that have a gradient, of all that is in these modules and in none that was given to another call of it.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    calls: dict[nn.Module, Any] = {}
    given: dict[Any, list[str]] = {}
    together: dict[Any, dict[str, nn.Parameter]] = {}
    for name, part in module.named_modules():  # a module comes before its children
        if isinstance(part, FSDPModule):  # a class that fully_shard puts in front of the module's own
            call = fully_shard.state(part)  # type: ignore[attr-defined]  # one for all modules of a call
            given.setdefault(call, []).append(name)
            for inner in nn.Module.modules(part):  # type: ignore[arg-type]
                calls[inner] = call
        for parameter_name, parameter in part.named_parameters(name, recurse=False):
            if part in calls and parameter.requires_grad and layout(parameter) is not None:
                together.setdefault(calls[part], {})[parameter_name] = parameter
    return {tuple(given[call]): parameters for call, parameters in together.items()}
