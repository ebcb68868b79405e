"""AdamW over half weights with FP32 masters.

The weights that forward and backward read are the rounding of a master, and the master is what AdamW updates: a change
too small for half precision adds up there (Micikevicius et al., arXiv 1710.03740, section 3.1). Gradients may be half
and scaled; they are unscaled and clipped in FP32 within the update (`kernels/reference.py`), which torch.amp.GradScaler
cannot do for fp16 gradients, and torch.optim.AdamW could only in half.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from .kernels.reference import GradientTransform, Slot, adamw_, scan_gradients
from .masters import MasterWeights
from .pieces import dense, ordered_like
from .storage import HALF_DTYPES, MasterStorage, check_optimizer_state, master_storage

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class MasterOptimizer(Optimizer):
    """What every optimizer over master weights can do, whatever its rule.

    A caller may set, for one `step`, the attributes that torch's fused optimizers know: `grad_scale` (float32, one
    element: the gradients are divided by it) and `found_inf` (float32, one element: not zero means that nothing may
    change); and `clip_value` (a number: largest magnitude of an element of the unscaled gradient).
    """

    _step_supports_amp_scaling = True  # asked by torch.amp.GradScaler

    grad_scale: Tensor
    found_inf: Tensor
    clip_value: float | None

    masters: MasterWeights
    masters_in_module: bool = False
    """Whether the module's own state_dict holds the masters, so that the optimizer's need not."""

    def master_params(self) -> list[Tensor]:
        """The FP32 master weights, in parameter order. Read only: some are what is stored, others decoded copies."""
        return [self.masters.read(parameter) for parameter in self.parameters()]

    def parameters(self) -> Iterator[Tensor]:
        """The parameters of all groups, in order."""
        return (parameter for group in self.param_groups for parameter in group["params"])

    def scan_gradients(self, *, norm: bool) -> tuple[Tensor, Tensor | None]:
        """Look once at all gradients, as they are (still scaled).

        Args:
            norm: whether the Euclidean norm over all of them is wanted.

        Returns:
            `found_inf` (float32 without dimensions, 1 if any element is inf or NaN), and the norm (the same) or None;
            both on the device of the first gradient.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        for gradient in gradients:
            _refuse_sparse(gradient)
        found: list[Tensor] = []
        norms: list[Tensor] = []
        for _, on_device in groupby(sorted(gradients, key=_device_name), key=_device_name):
            found_inf, part = scan_gradients(list(on_device), norm=norm)
            found.append(found_inf)
            norms += [] if part is None else [part]
        if not found:
            device = next(self.parameters()).device
            return torch.zeros((), device=device), torch.zeros((), device=device) if norm else None
        device = gradients[0].device
        found_inf = torch.stack([one.to(device) for one in found]).amax()
        return found_inf, torch.linalg.vector_norm(torch.stack([one.to(device) for one in norms])) if norm else None

    def memory_categories(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For the memory profiler: which tensor beside the optimizer's state is what, and whose."""
        owned = set(self.parameters())
        for parameter, stored in self.masters:
            if parameter in owned:
                yield "master_weights", stored, parameter

    def _gradient_transform(self, device: torch.device) -> GradientTransform:
        scale, clip_value = getattr(self, "grad_scale", None), getattr(self, "clip_value", None)
        if scale is None:
            return GradientTransform(1.0, clip_value)
        if device.type == "cpu":
            return GradientTransform(1.0 / float(scale), clip_value)
        return GradientTransform(scale.to(device, non_blocking=True).reciprocal(), clip_value)

    def _found_inf(self, device: torch.device) -> Tensor | None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        return None if found_inf is None else found_inf.to(device, non_blocking=True).reshape(())


class MasterAdamW(MasterOptimizer, AdamW):
    r"""AdamW over half (or FP32) parameters, with FP32 master weights.

    Loshchilov and Hutter, arXiv 1711.05101, as in `torch.optim.AdamW`: `state[p]` is the same (`step`, `exp_avg`,
    `exp_avg_sq`, all float32), so is every key of the groups, and with FP32 parameters so is every step.

    Args:
        params: parameters or groups, float16, bfloat16 or float32.
        lr: learning rate, a number or a float32 tensor of one element.
        betas: decay rates of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        amsgrad: divide by the largest second moment seen (Reddi et al., arXiv 1904.09237).
        maximize: ascend.
        master_weights: `"split"`: 2 bytes beside each half weight, exact; `"float32"`: a plain copy, 4 bytes.
        optimizer_state: how the moments are stored: `"float32"`.
        masters: the FP32 start values, in parameter order. The half weights become their rounding. Without them a half
            parameter starts from its own value: hand over the FP32 weights that it was cast from.

    `state_dict()` holds each master in FP32 under `"master"`, beside what AdamW would save.

    Raises:
        ValueError: a number out of range, an unknown storage, or masters that do not fit. TypeError: a parameter of
            another dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        master_weights: str = "split",
        optimizer_state: str = "float32",
        masters: Iterable[Tensor] | None = None,
    ) -> None:
        check_optimizer_state(optimizer_state)
        _check_settings({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.storage: MasterStorage = master_storage(master_weights)
        self.masters = MasterWeights()
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        if masters is not None:
            self._write_masters(list(masters))

    @classmethod
    def adopt(cls, optimizer: Optimizer, masters: MasterWeights, master_weights: str) -> "MasterAdamW":
        """Make this very `torch.optim.Adam` or `AdamW` object a MasterAdamW, until `release`.

        Its groups, state, hooks, schedulers and every reference to it stay what they are; the class changes.

        Args:
            optimizer: of exactly the class Adam or AdamW. Adam keeps its weight decay in the gradient.
            masters: the masters of its parameters, shared by all that knows them.
            master_weights: how they are to be stored.
        """
        for group in optimizer.param_groups:
            _check_settings(group)
            _check_parameters(group["params"])
        optimizer.__dict__.pop("step", None)  # the tracker of an LRScheduler, bound to the old class
        adopted: MasterAdamW = optimizer  # type: ignore[assignment]
        adopted._adopted_class = type(optimizer)
        adopted.__class__ = cls
        adopted.storage, adopted.masters, adopted.masters_in_module = master_storage(master_weights), masters, True
        adopted._patch_step_function()
        for parameter in adopted.parameters():
            if parameter.dtype in HALF_DTYPES:
                masters.claim(parameter, adopted.storage)
        return adopted

    _adopted_class: type[Optimizer]

    def release(self) -> None:
        """Be the optimizer again that was adopted."""
        self.__class__ = self.__dict__.pop("_adopted_class")
        del self.storage, self.masters, self.masters_in_module
        self._patch_step_function()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; ValueError or TypeError for a number or a parameter that cannot be."""
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
            _check_parameters(self.param_groups[-1]["params"])
        except (ValueError, TypeError):
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update masters, moments and weights in place. Gradients are only read.

        A step with `found_inf` set changes nothing, bit for bit. On CUDA that is decided on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._opt_called = True  # asked by LRScheduler, for its advice on the order of calls
        for group in self.param_groups:
            with_gradients = [parameter for parameter in group["params"] if parameter.grad is not None]
            for _, parameters in groupby(sorted(with_gradients, key=_device_name), key=_device_name):
                self._step(group, list(parameters))
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _step(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Update the parameters of a group that have gradients and share a device."""
        device = parameters[0].device
        found_inf = self._found_inf(device)
        if device.type == "cpu" and found_inf is not None:
            if found_inf:
                return
            found_inf = None
        slots = [self._slot(parameter, group["amsgrad"]) for parameter in parameters]
        torch._foreach_add_([slot.step for slot in slots], 1 if found_inf is None else 1 - (found_inf != 0).float())
        lr = group["lr"]
        adamw_(
            slots,
            self.storage,
            self._gradient_transform(device),
            lr=lr.to(device, non_blocking=True) if isinstance(lr, Tensor) else lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            found_inf=found_inf,
        )
        for parameter, slot in zip(parameters, slots, strict=True):
            if slot.master is not None:
                self.masters.stepped(parameter)

    def _slot(self, parameter: Tensor, amsgrad: bool) -> Slot:
        """All that the parameter's update needs; its state is made where there is none yet."""
        gradient = parameter.grad
        assert gradient is not None
        _refuse_sparse(gradient)
        state = self.state[parameter]
        if not state:
            # On the parameter's device, where the kernel reads it: no wait, and fit for a CUDA graph.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS if amsgrad else MOMENTS[:2]:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        weight = dense(parameter.detach())
        for name in MOMENTS:
            if name in state:  # as the weight lies now: its memory format may have changed, or theirs in a file
                state[name] = ordered_like(state[name], weight)
        return Slot(
            weight=parameter.detach(),
            gradient=gradient,
            master=self.masters.claim(parameter, self.storage) if parameter.dtype in HALF_DTYPES else None,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            max_exp_avg_sq=state["max_exp_avg_sq"] if amsgrad else None,
            step=state["step"],
        )

    def _write_masters(self, values: Sequence[Tensor]) -> None:
        parameters = list(self.parameters())
        if len(values) != len(parameters):
            raise ValueError(
                f"masters has {len(values)} tensors for {len(parameters)} parameters: give one for each, in order."
            )
        for index, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            if value.shape != parameter.shape or value.dtype != torch.float32:
                raise ValueError(
                    f"masters[{index}] is {value.dtype} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: give torch.float32 values of that shape."
                )
            if not value.isfinite().all():
                raise ValueError(f"masters[{index}] holds inf or NaN: give the finite weights to start from.")
        for parameter, value in zip(parameters, values, strict=True):
            if parameter.dtype in HALF_DTYPES:
                self.masters.write(parameter, value.detach().clone(), self.storage)
            else:
                with torch.no_grad():
                    parameter.copy_(value)

    # -- saving and loading -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What AdamW would save; and, used without the plugin, each master (float32) as `"master"`."""
        state_dict = super().state_dict()
        if not self.masters_in_module:
            # The packed entries are the live ones: copied before they are added to.
            state = state_dict["state"] = dict(state_dict["state"])
            for index, parameter in enumerate(self.parameters()):
                if parameter.dtype in HALF_DTYPES:
                    state[index] = {**state.get(index, {}), "master": self.masters.read(parameter)}
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what AdamW or MasterAdamW saved. Moments and masters stay FP32, whatever the parameters are.

        Raises:
            ValueError: groups or shapes do not fit, or a key is missing; nothing has changed then.
        """
        parameters = list(self.parameters())
        # By position: the saved groups number the same parameters in the same order.
        saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        loaded = {}
        for parameter, saved_id in zip(parameters, saved_ids, strict=False):
            if saved_id in state_dict["state"]:
                loaded[parameter] = _checked_state(state_dict["state"][saved_id], parameter, saved_id)
        # Not torch's own way for the state: it would cast it to the parameters' half.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, state in loaded.items():
            master = state.pop("master", None)
            if master is not None and parameter.dtype in HALF_DTYPES:
                self.masters.write(parameter, master.clone(), self.storage)
            elif master is not None:
                parameter.copy_(master)
            if state:
                self.state[parameter] = {
                    name: torch.as_tensor(value, dtype=torch.float32).to(parameter.device, copy=True)
                    for name, value in state.items()
                }

    def __getstate__(self) -> dict[str, Any]:
        mine = {name: self.__dict__[name] for name in ("storage", "masters")}
        return {**super().__getstate__(), **mine}


def _checked_state(state: dict[str, Any], parameter: Tensor, saved_id: Any) -> dict[str, Any]:
    """A shallow copy of one parameter's saved state; ValueError if it is not AdamW's or does not fit."""
    if set(state) != {"master"}:
        missing = [name for name in ("step", *MOMENTS[:2]) if name not in state]
        if missing:
            raise ValueError(
                f"The saved state of parameter {saved_id!r} has {sorted(state)} and lacks {missing}: "
                "load a state_dict of AdamW, Adam or MasterAdamW."
            )
    for name in (*MOMENTS, "master"):
        if name in state and state[name].shape != parameter.shape:
            raise ValueError(
                f"The saved {name} of parameter {saved_id!r} has shape {tuple(state[name].shape)} and the parameter "
                f"{tuple(parameter.shape)}: load the state of the same model."
            )
    return dict(state)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError where the settings of a group are not AdamW's."""
    for name, example in (("lr", 1e-3), ("eps", 1e-8), ("weight_decay", 1e-2)):
        value = settings[name]
        if not isinstance(value, int | float | Tensor) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a finite number of at least 0, such as {example}.")
    betas = settings["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(_is_decay_rate(beta) for beta in betas):
        raise ValueError(f"betas={betas!r} must be two numbers of at least 0 and below 1, such as (0.9, 0.999).")
    if settings.get("differentiable"):
        raise ValueError("differentiable=True cannot be: autograd does not record the update. Leave it out.")


def _is_decay_rate(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and bool(0 <= value < 1)


def _check_parameters(parameters: Iterable[Tensor]) -> None:
    """TypeError where a parameter cannot be trained with FP32 masters."""
    for parameter in parameters:
        if parameter.dtype not in (*HALF_DTYPES, torch.float32):
            raise TypeError(
                f"A parameter of dtype {parameter.dtype} cannot be trained with FP32 masters: "
                "make it torch.float32, torch.float16 or torch.bfloat16."
            )


def _refuse_sparse(gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"A gradient has the layout {gradient.layout}; the update takes dense ones only: use sparse=False in "
            "nn.Embedding or nn.EmbeddingBag."
        )


def _device_name(tensor: Tensor) -> str:
    return str(tensor.device)
