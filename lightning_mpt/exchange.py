"""Other parameters in an optimizer's hands, for a moment: in its groups, its attributes, and optimizers inside it.

Many optimizers hold parameters in more places than `param_groups`: LBFGS keeps a list of them, others a dictionary by
parameter, and SAM and Lookahead an optimizer inside, most often with the same groups.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .masters import MasterWeights
from .storage import is_half

NOT_LISTS = frozenset({"param_groups", "state", "defaults"})
"""Attributes of every optimizer: its groups are exchanged as such, and its state is by what it steps."""


def exchanged(value: Any, others: Mapping[Tensor, Tensor]) -> Any:
    """`value` with other tensors in the place of some, in lists, tuples, sets and dictionaries, their keys too.

    A new container where one of them was in it, else the same.
    """
    if isinstance(value, Tensor):
        return others.get(value, value)
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return value
    items = list(value.items()) if isinstance(value, dict) else list(value)
    made = [exchanged(item, others) for item in items]
    if all(new is old for new, old in zip(made, items, strict=True)):
        return value
    if isinstance(value, tuple | frozenset):
        return value._make(made) if hasattr(value, "_make") else type(value)(made)
    container = copy.copy(value)  # of its own type: a defaultdict makes what is missing as before
    container.clear()
    container.extend(made) if isinstance(container, list) else container.update(made)
    return container


def optimizers_within(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer itself, and those that it or one of these has as attributes, or in lists or dictionaries."""
    found = [optimizer]
    for one in found:
        found += [inner for inner in _optimizers(list(vars(one).values())) if inner not in found]
    return found


def _optimizers(value: Any) -> list[Optimizer]:
    if isinstance(value, Optimizer):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for item in value for one in _optimizers(item)] if isinstance(value, list | tuple) else []


class Hands:
    """All places where an optimizer holds parameters.

    Attributes:
        optimizers: the optimizer and those inside it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizers = optimizers_within(optimizer)
        marks = {parameter: Tensor() for group in self.groups() for parameter in group["params"]}
        self._lists = [
            (one, name)
            for one in self.optimizers
            for name, value in vars(one).items()
            if name not in NOT_LISTS and exchanged(value, marks) is not value
        ]
        """The attributes that hold any of the parameters."""

    def bring_to_fp32(self, masters: MasterWeights) -> None:
        """Copies of half weights that the optimizers made of them, as Lookahead's slow ones, become their masters'.

        Other half tensors in their attributes and groups become FP32 as well.
        """
        parameters = {parameter for group in self.groups() for parameter in group["params"]}
        made = _Made(lambda tensor: tensor if tensor in parameters else _in_fp32(tensor, parameters, masters))
        for optimizer in self.optimizers:
            for name, value in vars(optimizer).items():
                if name not in NOT_LISTS:
                    vars(optimizer)[name] = exchanged(value, made)
        for group in self.groups():
            group.update({name: exchanged(value, made) for name, value in group.items() if name != "params"})

    def groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, once where they share one."""
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return list({id(group): group for group in groups}.values())

    def states(self) -> list[dict[Any, Any]]:
        """Their states, once where they share one."""
        return list({id(optimizer.state): optimizer.state for optimizer in self.optimizers}.values())

    @contextmanager
    def holding(self, others: dict[Tensor, Tensor], other: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within it they hold other parameters; afterwards their own again, in what they have made new as well.

        Args:
            others: of each parameter its other one; may grow.
            other: gives that of a parameter in a group, and enters it into `others`.
        """
        ours = [(group, group["params"]) for group in self.groups()]
        try:
            for group, parameters in ours:
                group["params"] = [other(parameter) for parameter in parameters]
            self._exchange_lists(others)
            yield
        finally:
            back = {theirs: own for own, theirs in others.items()}
            self._exchange_lists(back)
            now = self.groups()  # `load_state_dict` makes new ones
            for group in now:
                group["params"] = exchanged(group["params"], back)
            for group, parameters in ours:  # the very lists, but where the optimizer has put others in their place
                if all(group is not one for one in now) or list(map(id, group["params"])) == list(map(id, parameters)):
                    group["params"] = parameters

    def give_back(self, back: Mapping[Tensor, Tensor]) -> None:
        """For good: what was kept in the others' name, state and new attributes, belongs to their own again."""
        for state in self.states():
            for theirs, own in back.items():
                if theirs is not own and theirs in state:
                    state[own] = state.pop(theirs)
        for optimizer in self.optimizers:
            for name, value in vars(optimizer).items():
                if name not in NOT_LISTS:
                    vars(optimizer)[name] = exchanged(value, back)

    def _exchange_lists(self, others: Mapping[Tensor, Tensor]) -> None:
        for optimizer, name in self._lists:
            if name in vars(optimizer):
                vars(optimizer)[name] = exchanged(vars(optimizer)[name], others)


class _Made(dict[Tensor, Tensor]):
    """For each tensor that is asked for, what is made of it then, once."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._make = make

    def get(self, tensor: Tensor, default: Any = None) -> Tensor:
        if tensor not in self:
            self[tensor] = self._make(tensor)
        return self[tensor]


def _in_fp32(tensor: Tensor, parameters: Iterable[Tensor], masters: MasterWeights) -> Tensor:
    """A half tensor in FP32, with the master's digits where it is a copy of a half weight; any other as it is."""
    if not is_half(tensor):
        return tensor
    values = tensor.detach().float()
    for parameter in parameters:
        if parameter.dtype == tensor.dtype and parameter.shape == tensor.shape and torch.equal(parameter, tensor):
            values = masters.read(parameter).clone()
            break
    return values.requires_grad_(tensor.requires_grad)
