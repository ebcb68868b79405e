"""Other parameters in an optimizer's hands, for a moment: in its groups, its attributes, and optimizers inside it.

Many optimizers hold parameters in more places than `param_groups`: LBFGS keeps a list of them, others a dictionary by
parameter, and SAM and Lookahead an optimizer inside, most often with the same groups.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

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
