"""Any other optimizer over FP32 masters: it never learns that the module's weights are half.

Within `step`, `state_dict` and `load_state_dict` the groups hold FP32 parameters (the masters) with unscaled FP32
gradients; outside, they hold the module's own half parameters, so that `zero_grad`, schedulers and users see what they
gave. The cost, beside what the optimizer itself keeps: 4 bytes per parameter for the master, whatever
`master_weights` says, 4 more for FP32 gradients while it steps, and on CUDA one wait for the device per step, since a
rule that is not ours cannot be told to change nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils._pytree import tree_leaves, tree_map

from .base import MasterOptimizer, class_in_front
from .kernels.gradients import true_gradient
from .masters import MasterWeights
from .pieces import dense
from .shards import local, replace, sharded_like
from .storage import HALF_DTYPES, half_to_fp32, master_storage

STORAGE = master_storage("float32")


class BridgedOptimizer(MasterOptimizer):
    """The part in front of the user's optimizer class; `bridge` puts the two together."""

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The optimizer's own step on masters and true gradients; then the half weights become their rounding.

        Args:
            closure: runs first, once.
            kwargs: whatever else the optimizer's own `step` takes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._opt_called = True  # asked by LRScheduler, for its advice on the order of calls
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return loss
        with self._masters_in_groups(), self._true_gradients(), self._inputs_hidden():
            # Some optimizers take no step without a closure. What it does is done: now it only tells the loss.
            # By keyword, as Lightning gives it: the optimizer may take it in no other way.
            super().step(**({} if closure is None else {"closure": lambda: cast(Any, loss)}), **kwargs)
        for parameter in self.parameters():
            if parameter.grad is not None and parameter.dtype in HALF_DTYPES:
                self.masters.publish(parameter)
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined]  # the optimizer's own step calls the step hooks

    def state_dict(self) -> dict[str, Any]:
        with self._masters_in_groups():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer does it, into FP32. ValueError if its settings are another optimizer's."""
        settings = [set(self.defaults) & set(group) for group in self.param_groups]
        with self._masters_in_groups():
            super().load_state_dict(state_dict)
        # Only now: an optimizer may fill in what files of its older versions lack.
        for index, group in enumerate(self.param_groups):
            if missing := sorted(settings[index] - set(group)):
                raise ValueError(
                    f"The saved group {index} has {sorted(set(group) - {'params'})} and lacks {missing} of "
                    f"{self._adopted_class.__name__}: load the state of the same optimizer."
                )

    def memory_categories(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        yield from super().memory_categories()
        for parameter, master in self._masters_of.items():
            if master is parameter:
                continue
            if master.grad is not None:
                yield "gradients", master.grad, parameter
            for value in tree_leaves(self.state.get(master)):
                if isinstance(value, Tensor):
                    yield "optimizer_state", value, parameter

    def release(self) -> None:
        """Be the optimizer again that was adopted; its state belongs to the module's parameters."""
        for parameter, master in self._masters_of.items():
            if master is not parameter and master in self.state:
                self.state[parameter] = self.state.pop(master)
        self.__class__ = self.__dict__.pop("_adopted_class")
        del self._masters_of, self.masters, self.masters_in_module

    _adopted_class: type[Optimizer]
    _masters_of: dict[Tensor, Tensor]
    """Each parameter's master, as the parameter that the optimizer sees; of a float32 parameter, itself."""

    def _master_of(self, parameter: Tensor) -> Tensor:
        if parameter.dtype not in HALF_DTYPES:
            return self._masters_of.setdefault(parameter, parameter)
        stored = self.masters.claim(parameter, STORAGE)
        master = self._masters_of.get(parameter)
        if master is None:
            master = self._masters_of[parameter] = torch.nn.Parameter(sharded_like(stored, parameter))
        elif local(master).data_ptr() != stored.data_ptr():
            replace(
                master, sharded_like(stored, parameter)
            )  # made anew, from a half weight that someone else had written
        return master

    @contextmanager
    def _masters_in_groups(self) -> Iterator[None]:
        ours = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = [self._master_of(parameter) for parameter in group["params"]]
            yield
        finally:
            for group, parameters in zip(self.param_groups, ours, strict=True):
                group["params"] = parameters

    @contextmanager
    def _inputs_hidden(self) -> Iterator[None]:
        """Within it, no attribute says that gradients are scaled: the optimizer might divide once more, or refuse."""
        names = ("grad_scale", "found_inf")
        hidden: dict[str, Any] = {name: self.__dict__.pop(name) for name in names if name in self.__dict__}
        try:
            yield
        finally:
            self.__dict__.update(hidden)

    @contextmanager
    def _true_gradients(self) -> Iterator[None]:
        """Within it, the masters of parameters with gradients have them unscaled and clipped in FP32."""
        scaled = {parameter: parameter.grad for parameter in self._masters_of if parameter.grad is not None}
        try:
            for parameter, gradient in scaled.items():
                gradient = dense(local(gradient))
                out = torch.empty_like(gradient, dtype=torch.float32)
                transform = self._gradient_transform(gradient.device)
                self._masters_of[parameter].grad = sharded_like(true_gradient(gradient, transform, out), parameter)
            yield
        finally:
            for parameter in scaled:
                self._masters_of[parameter].grad = None
            for parameter, gradient in scaled.items():
                parameter.grad = gradient


def bridge(optimizer: Optimizer, masters: MasterWeights) -> BridgedOptimizer:
    """Make this very optimizer object step FP32 masters, until `release`.

    Args:
        optimizer: any optimizer whose `step` needs no closure and takes dense gradients.
        masters: the masters of its parameters.
    """
    optimizer.__dict__.pop("step", None)  # the tracker of an LRScheduler, bound to the old class
    adopted = type(optimizer)
    bridged = cast(BridgedOptimizer, optimizer)
    bridged.__class__ = class_in_front(BridgedOptimizer, adopted)  # type: ignore[arg-type]
    bridged._adopted_class = adopted
    bridged.masters, bridged.masters_in_module, bridged._masters_of = masters, True, {}
    with bridged._masters_in_groups():
        for parameter, master in bridged._masters_of.items():
            if master is not parameter and parameter in bridged.state:
                # Adagrad makes its state at once, like the parameter: half.
                state = bridged.state.pop(parameter)
                bridged.state[master] = tree_map(half_to_fp32, state)
    return bridged


def refuse_unfit(optimizer: Any) -> None:
    """ValueError or TypeError, with the reason, for what cannot be stepped over master weights."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"{name} evaluates the loss many times within a step, which loss scaling cannot follow: "
            "use another optimizer, or precision='32-true'."
        )
    if isinstance(optimizer, SparseAdam):
        raise ValueError(f"{name} takes sparse gradients, and the update takes dense ones only: use AdamW.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is not a torch.optim.Optimizer; masters are kept for one's parameters: use one.")
