"""Any other optimizer over FP32 masters: it never learns that the module's weights are half.

Within `step`, `state_dict` and `load_state_dict` the groups hold FP32 parameters (the masters) with unscaled FP32
gradients; outside, they hold the module's own half parameters, so that `zero_grad`, schedulers and users see what they
gave. So it is with lists of parameters that the optimizer keeps itself, and with an optimizer inside it. Public methods
that it has beside `step` (`train` and `eval` of schedule-free optimizers, SAM's `first_step`) run over the masters as
well, and the half weights then become their rounding.

The cost, beside what the optimizer itself keeps: 4 bytes per parameter for the master, whatever `master_weights` says,
4 more for FP32 gradients while it steps, and on CUDA one wait for the device per step, since a rule that is not ours
cannot be told to change nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from inspect import isgeneratorfunction, unwrap
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils._pytree import tree_leaves, tree_map

from .base import MasterOptimizer, class_in_front, unwrapped
from .exchange import Hands, exchanged
from .kernels.gradients import true_gradient
from .masters import MasterWeights
from .numerics import default_dtype
from .own_methods import own_methods, reads_gradients
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

        Raises:
            RuntimeError: the optimizer wrote to half weights, or wants the loss at other weights than the closure's.
        """
        if self._over_masters:  # called by a method of the optimizer's own
            return super().step(**({} if closure is None else {"closure": closure}), **kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._opt_called = True  # asked by LRScheduler, for its advice on the order of calls
        if self._stepped_by_plugin():
            return loss
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return loss
        with self._masters_in_groups(), self._true_gradients(), self._inputs_hidden(), self._halves_untouched("step"):
            before = {parameter: _marks(master) for parameter, master in self._masters_of.items()}
            # Some optimizers take no step without a closure. What it does is done: now it only tells the loss.
            # By keyword, as Lightning gives it: the optimizer may take it in no other way.
            known = {} if closure is None else {"closure": lambda: self._known_loss(loss, before)}
            super().step(**known, **kwargs)
            written = {p for p, (version, _) in before.items() if self._masters_of[p]._version != version}
        for parameter in self._halves():
            # Without a gradient it may be decayed or averaged all the same.
            if before[parameter].gradient is not None or parameter in written:
                self.masters.publish(parameter)
        return loss

    def _known_loss(self, loss: Any, before: "dict[Tensor, _Marks]") -> Any:
        """What the closure gave; RuntimeError where that is out of date."""
        for parameter, marks in before.items():
            now = _marks(self._masters_of[parameter])
            gone = now.gradient is None and marks.gradient is not None
            if gone or now.version != marks.version:
                raise RuntimeError(
                    f"{self._name}.step asks for the loss again after it has changed weights or let go of gradients, "
                    "and here forward and backward run once: call its parts one by one, if it has methods for them, in "
                    "manual optimization under 'bf16-true'; or use precision='32-true'."
                )
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
            for value in tree_leaves([state.get(master) for state in self._hands.states()]):
                if isinstance(value, Tensor):
                    yield "optimizer_state", value, parameter

    def release(self) -> None:
        """Be the optimizer again that was adopted; its state belongs to the module's parameters."""
        for handle in self._guards:
            handle.remove()
        hands, masters_of = self._hands, self._masters_of
        self.__class__ = self.__dict__.pop("_adopted_class")
        del self._masters_of, self.masters, self.masters_in_module, self._hands, self._guards
        del self._loss_scaled, self._clip_noted, self._trusted
        self.__dict__.pop("stepper", None)
        hands.give_back({master: parameter for parameter, master in masters_of.items()})

    _adopted_class: type[Optimizer]
    _hands: Hands
    _guards: list[Any]
    """What keeps the optimizers inside from being stepped on their own."""
    _loss_scaled: bool
    _clip_noted: Callable[[], bool]
    _trusted: bool
    """Whether it has been seen to leave half weights alone."""
    _over_masters: bool = False
    """Whether masters are in the groups now."""
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

    def _guard(self, inner: Optimizer, *_: Any) -> None:
        """RuntimeError where an optimizer inside is stepped while it holds half weights."""
        if not self._over_masters:
            raise RuntimeError(
                f"{type(inner).__name__} inside {self._name} was stepped on its own, over half weights: call a method "
                f"of {self._name} that steps it."
            )

    @property
    def _name(self) -> str:
        return self._adopted_class.__name__

    def _halves(self) -> list[Tensor]:
        """The half parameters in the groups, of the optimizers inside too."""
        parameters = [parameter for group in self._hands.groups() for parameter in group["params"]]
        return [parameter for parameter in parameters if self._masters_of.get(parameter, parameter) is not parameter]

    @contextmanager
    def _masters_in_groups(self) -> Iterator[None]:
        """Within it, the masters are where the optimizer holds the half parameters."""
        with self._hands.holding(self._masters_of, self._master_of):
            held = [(parameter, master) for parameter, master in self._masters_of.items() if master is not parameter]
            memory = [local(master).data for _, master in held]
            self._over_masters = True
            try:
                yield
            finally:
                del self._over_masters
                for (parameter, master), stored in zip(held, memory, strict=True):
                    # By `p.data = ...` an optimizer gives a master other memory: its values go where it is stored.
                    if local(master).data_ptr() != stored.data_ptr():
                        stored.copy_(local(master).detach())
                        replace(master, sharded_like(stored, parameter))

    @contextmanager
    def _halves_untouched(self, method: str) -> Iterator[None]:
        """RuntimeError where the half weights, or their gradients, were written to within it.

        In the first step of an optimizer that is not torch's, their values are compared: a write by `.data` counts no
        version.

        Args:
            method: the name of what the optimizer does there.
        """
        before = {p: _marks(p) for p, master in self._masters_of.items() if master is not p}
        values = {} if self._trusted or method != "step" else {p: _copies(p) for p in before if p.grad is not None}
        yield
        for parameter, (version, gradient) in before.items():
            now = _marks(parameter)
            weight_was, gradient_was = values.get(parameter, (None, None))
            written = now.version != version or _differs(parameter, weight_was)
            if written or now.gradient not in (None, gradient) or _differs(parameter.grad, gradient_was):
                what = "weights" if written else "gradients"
                raise RuntimeError(
                    f"{self._name}.{method} wrote to half {what} of the module, first those of shape "
                    f"{tuple(parameter.shape)}: an optimizer, and a hook on its step, must update the parameters in "
                    "param_groups, which are FP32 masters meanwhile, and leave forward and backward to the loop. Let "
                    f"{self._name} take its parameters from self.param_groups whenever it steps; write to the module "
                    "after the step; or use precision='32-true'."
                )
        self._trusted |= bool(values)

    def _run_over_masters(self, run: Callable[..., Any], method: str, reads: bool, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the optimizer's own over the masters; then the half weights become their rounding.

        Args:
            run: the method, or a part of it.
            method: its name.
            reads: whether it reads gradients. It is given true ones, and what it makes of them holds.
            args: of the method; half parameters among them are exchanged.
            kwargs: the same.

        Raises:
            RuntimeError: it reads gradients, and they are scaled or still to be clipped; or it wrote to half weights.
        """
        if self._over_masters:
            return run(*args, **kwargs)
        if reads and self._loss_scaled:
            raise RuntimeError(
                f"{self._name}.{method} reads gradients outside of step, where they are multiplied by the loss scale "
                "and nothing tells whether they are finite: use 'bf16-true', loss_scale=None, or precision='32-true'."
            )
        if reads and self._clip_noted():
            raise RuntimeError(
                f"{self._name}.{method} reads gradients outside of step, and clipping is noted for the step alone: "
                "clip them yourself, by torch.nn.utils.clip_grad_norm_ within the plugin's true_gradients()."
            )
        gradients: AbstractContextManager[None] = self._true_gradients(kept=True) if reads else nullcontext()
        # In manual optimization this may be within the training step, where the default is half.
        with default_dtype(torch.float32), self._masters_in_groups(), gradients, self._halves_untouched(method):
            args, kwargs = exchanged((args, kwargs), self._masters_of)
            result = run(*args, **kwargs)
        for parameter in self._halves():
            self.masters.publish(parameter, always=False)
        return exchanged(result, {master: parameter for parameter, master in self._masters_of.items()})

    @contextmanager
    def _entered_over_masters(self, context: Any, method: str, reads: bool) -> Iterator[Any]:
        """A context that the optimizer gives, such as one with averaged weights: what it does is over the masters."""
        value = self._run_over_masters(context.__enter__, method, reads)
        with ExitStack() as stack:
            stack.push(lambda *error: self._run_over_masters(context.__exit__, method, reads, *error))
            yield value

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
    def _true_gradients(self, *, kept: bool = False) -> Iterator[None]:
        """Within it, the masters of parameters with gradients have them unscaled and clipped in FP32.

        A gradient that the optimizer lets go of is gone afterwards.

        Args:
            kept: whether the parameters' gradients become what the masters' are then; else they stay as they are.
        """
        scaled = {parameter: parameter.grad for parameter in self._masters_of if parameter.grad is not None}
        given = set()
        try:
            for parameter, gradient in scaled.items():
                gradient = dense(local(gradient))
                out = torch.empty_like(gradient, dtype=torch.float32)
                transform = self._gradient_transform(gradient.device)
                self._masters_of[parameter].grad = sharded_like(true_gradient(gradient, transform, out), parameter)
                given.add(parameter)
            yield
        finally:
            for parameter, master in self._masters_of.items():
                left, master.grad = master.grad, None
                if parameter in scaled:
                    if kept and left is not None:
                        scaled[parameter].copy_(left.detach())
                    parameter.grad = None if left is None and parameter in given else scaled[parameter]
                elif kept and left is not None:
                    parameter.grad = left.to(parameter.grad_dtype or left.dtype)


class _Marks(NamedTuple):
    """What changes where somebody writes to a parameter or its gradient."""

    version: int
    gradient: int | None


def _copies(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    gradient = parameter.grad
    return local(parameter).detach().clone(), None if gradient is None else local(gradient).detach().clone()


def _differs(tensor: Tensor | None, before: Tensor | None) -> bool:
    return tensor is not None and before is not None and not torch.equal(local(tensor), before)


def _marks(parameter: Tensor) -> _Marks:
    return _Marks(parameter._version, None if parameter.grad is None else parameter.grad._version)


@cache
def _class_over_masters(adopted: type[Any]) -> type[Any]:
    """The class of a bridged optimizer, whose own methods run over the masters."""
    made = class_in_front(BridgedOptimizer, adopted)  # type: ignore[arg-type]
    for name, method in own_methods(adopted).items():
        if not hasattr(BridgedOptimizer, name):
            setattr(made, name, _over_masters(name, method, reads_gradients(adopted, method)))
    return made


def _over_masters(name: str, method: Callable[..., Any], reads: bool) -> Callable[..., Any]:
    gives_context = isgeneratorfunction(unwrap(method))

    @wraps(method)
    def run(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        optimizer = unwrapped(self)
        if not isinstance(optimizer, BridgedOptimizer):  # let go since
            return method(optimizer, *args, **kwargs)
        result = optimizer._run_over_masters(method.__get__(optimizer), name, reads, *args, **kwargs)
        if gives_context and isinstance(result, AbstractContextManager):
            return optimizer._entered_over_masters(result, name, reads)
        return result

    return run


def bridge(
    optimizer: Optimizer,
    masters: MasterWeights,
    *,
    loss_scaled: bool = False,
    clip_noted: Callable[[], bool] = lambda: False,
) -> BridgedOptimizer:
    """Make this very optimizer object step FP32 masters, until `release`.

    Args:
        optimizer: any optimizer whose `step` needs no closure and takes dense gradients.
        masters: the masters of its parameters.
        loss_scaled: whether gradients are multiplied by a loss scale before `step` is told of it.
        clip_noted: tells whether its next `step` is to clip them.
    """
    optimizer.__dict__.pop("step", None)  # the tracker of an LRScheduler, bound to the old class
    adopted, hands = type(optimizer), Hands(optimizer)
    hands.bring_to_fp32(masters)
    bridged = cast(BridgedOptimizer, optimizer)
    bridged.__class__ = _class_over_masters(adopted)  # type: ignore[arg-type]
    bridged._adopted_class = adopted
    bridged.masters, bridged.masters_in_module, bridged._masters_of = masters, True, {}
    bridged._hands, bridged._guards = hands, []
    bridged._trusted = adopted.__module__.startswith("torch.optim")
    bridged._loss_scaled, bridged._clip_noted = loss_scaled, clip_noted
    with bridged._masters_in_groups():
        for parameter, master in bridged._masters_of.items():
            for state in hands.states():
                if master is not parameter and parameter in state:
                    # Adagrad makes its state at once, like the parameter: half.
                    state[master] = tree_map(half_to_fp32, state.pop(parameter))
    bridged._guards = [inner.register_step_pre_hook(bridged._guard) for inner in hands.optimizers[1:]]
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
