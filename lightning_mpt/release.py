"""Gradient release: each parameter is updated within backward once its gradient is complete, which is then freed.

Gradients never add up: at any moment there are those that backward is working on, and, on CUDA, as many others as are
worth a launch of the update's kernel together. What needs to see them all before the first is used cannot be had with
it: a step that is skipped as a whole, a dynamic loss scale, the norm that clipping divides by, and accumulation over
batches. A parameter whose gradient is not finite is skipped alone, and counted.
"""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .optimizer import MasterAdamW


def check_loop(
    *,
    automatic: bool = True,
    accumulated: int = 1,
    clip_val: float | None = None,
    algorithm: str | None = None,
) -> None:
    """ValueError where the training loop needs all gradients at once. The arguments are the Trainer's own."""
    if not automatic:
        raise ValueError(
            "gradient_release=True cannot be with manual optimization, where backward need not mean a step: leave it "
            "out, or let the Trainer optimize."
        )
    if accumulated != 1:
        raise ValueError(
            f"gradient_release=True cannot be with accumulate_grad_batches={accumulated}: gradients are gone before "
            "the next batch. Leave one of the two out."
        )
    if clip_val and algorithm != "value":
        raise ValueError(
            f"gradient_release=True cannot be with gradient_clip_val={clip_val} by norm: the norm is known when all "
            "gradients are. Clip by value, gradient_clip_algorithm='value', or not at all."
        )


class GradientRelease:
    """The hooks that update one optimizer's parameters while `backward` runs.

    Args:
        optimizers: all that train the module. There must be one, a MasterAdamW; its parameters are updated in place,
            with the settings that their groups have at that moment.
        names: of the parameters, for messages.

    Raises:
        ValueError: there are others.
    """

    def __init__(self, optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]) -> None:
        optimizer = optimizers[0]
        if len(optimizers) > 1 or not isinstance(optimizer, MasterAdamW):
            kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise ValueError(
                f"gradient_release=True is for a single AdamW or Adam, and there are {kinds}: with several, backward "
                "does not know whose step it is, and other rules are not ours to take apart. Leave it out."
            )
        self._optimizer, self._names = optimizer, names
        self._handles: dict[Tensor, Any] = {}
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self.found: dict[Tensor, Tensor] = {}
        """Of the last backward, until its step: whether each gradient was not finite, as `step_some` says it."""
        self._waiting: dict[tuple[int, torch.device], dict[Tensor, None]] = {}
        """By their group's id and by device: parameters whose gradients are complete."""
        self._numels: Counter[tuple[int, torch.device]] = Counter()
        """How many elements these have."""
        self._scale: Tensor | None = None
        self._clip_value: float | None = None

    @contextmanager
    def running(self, scale: Tensor, clip_value: float | None) -> Generator[None, None, None]:
        """Within, backward updates parameters.

        Args:
            scale: the loss scale, by which gradients are divided (float32, no dimensions).
            clip_value: the largest magnitude of an element of a true gradient; None or 0 for any.
        """
        self._groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        for parameter in self._groups:
            if parameter not in self._handles and parameter.requires_grad:
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(self._complete)
        self._scale, self._clip_value = scale, float(clip_value) if clip_value else None
        self.found = {}
        try:
            yield
            for waiting in list(self._waiting):
                self._update_waiting(waiting)
        finally:
            for parameter in chain.from_iterable(self._waiting.values()):
                parameter.grad = None  # of a backward that ended in an exception
            self._scale, self._waiting, self._numels = None, {}, Counter()

    def check_clipping(self, clip_val: float, algorithm: str) -> None:
        """ValueError if gradients, which are gone by now, were not clipped as is asked for."""
        if clip_val and (algorithm != "value" or clip_val != self._clip_value):
            raise ValueError(
                f"Clipping to {clip_val} by {algorithm!r} is asked for after backward, and gradient_release=True "
                "has used the gradients by then: give Trainer(gradient_clip_val=..., gradient_clip_algorithm='value')."
            )

    def found_inf(self) -> Tensor:
        """Whether a gradient was not finite in the last backward: float32, no dimensions, on the device."""
        found = list(self.found.values())
        if not found:
            device = next(self._optimizer.parameters()).device
            return torch.zeros((), dtype=torch.float32, device=device)
        return torch.stack([one.to(found[0].device) for one in found]).amax()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _complete(self, parameter: Tensor) -> None:
        """Update the parameter, or let it wait until it is worth a launch together with others."""
        group, gradient = self._groups.get(parameter), parameter.grad
        if self._scale is None or group is None or gradient is None:
            return
        if parameter in self.found:
            raise RuntimeError(
                f"The gradient of {self._names.get(parameter, 'a parameter')} came again after it was updated, and "
                "gradient_release=True has used its first part by then. A module that checkpoint(use_reentrant=True) "
                "runs in several places does that: give use_reentrant=False, or leave gradient_release out."
            )
        if not gradient.numel():
            parameter.grad = None
            return
        alike = id(group), parameter.device
        waiting = self._waiting.setdefault(alike, {})
        if parameter in waiting:
            return  # more of its gradient has come in time
        waiting[parameter] = None
        self._numels[alike] += parameter.numel()
        if self._numels.total() >= self._optimizer.elements_worth_a_launch(parameter.device):
            # Those alone that free the most: biases and norms, often a group of their own, can wait for one another.
            self._update_waiting(max(self._numels, key=self._numels.__getitem__))

    @torch.no_grad()
    def _update_waiting(self, alike: tuple[int, torch.device]) -> None:
        """Update all that wait of a group on a device, in one launch, and free their gradients."""
        assert self._scale is not None
        del self._numels[alike]
        parameters = list(self._waiting.pop(alike))
        group = self._groups[parameters[0]]
        found = self._optimizer.step_some(parameters, group, self._scale, self._clip_value)
        self.found.update(zip(parameters, found.unbind(), strict=True))
        for parameter in parameters:
            parameter.grad = None
