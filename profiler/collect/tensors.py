"""What tensors a thing holds, and what memory a tensor lies in."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_BY_ROWS = ("crow_indices", "col_indices", "values")
_BY_COLUMNS = ("ccol_indices", "row_indices", "values")
_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}
"""The methods that give them."""
_in_transform = torch._C._functorch.is_functorch_wrapped_tensor


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain strided tensors that hold a tensor's data: several for a sparse one or a wrapper (DTensor, nested).

    Within `torch.func`'s transforms (vmap, grad) a tensor stands for another one, which has the memory.

    A wrapper that has a method `memory_parts()` knows best: it may hold other memory than torch is told of.
    """
    if _in_transform(tensor):
        yield from parts_of(torch._C._functorch.get_unwrapped(tensor))
    elif type(tensor) in _PLAIN and tensor.layout is torch.strided:  # nearly always: asked of every saved tensor
        yield tensor
    elif is_lazy(tensor):  # the first batch makes it
        return
    elif hasattr(tensor, "memory_parts"):
        yield from tensor.memory_parts()
    elif is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from parts_of(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor
    else:
        for part in _SPARSE_PARTS.get(tensor.layout, ()):
            yield getattr(tensor, part)()


def tensors_in(item: Any, depth: int = 8) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples, dictionaries and plain objects."""
    if isinstance(item, torch.Tensor):
        yield item
    elif depth == 0 or item is None or isinstance(item, str | bytes | int | float):
        return
    elif isinstance(item, dict) or hasattr(item, "items"):
        for value in dict(item).values():
            yield from tensors_in(value, depth - 1)
    elif isinstance(item, list | tuple | set | frozenset | deque):
        for value in item:
            yield from tensors_in(value, depth - 1)
    else:
        slots = {name for kind in type(item).__mro__ for name in vars(kind).get("__slots__", ())}
        for value in [*getattr(item, "__dict__", {}).values(), *(getattr(item, name, None) for name in slots)]:
            yield from tensors_in(value, depth - 1)


def is_computed(tensor: torch.Tensor) -> bool:
    """Whether autograd saw the tensor made; of a view, that of which it is one."""
    return not (tensor if tensor._base is None else tensor._base).is_leaf


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was written to in place; -1 for one of inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version
