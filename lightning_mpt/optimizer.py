"""AdamW over half weights with FP32 masters.

The weights that forward and backward read are the rounding of a master, and the master is what AdamW updates: a change
too small for half precision adds up there (Micikevicius et al., arXiv 1710.03740, section 3.1). Gradients may be half
and scaled; they are unscaled and clipped in FP32 within the update (`kernels/reference.py`), which torch.amp.GradScaler
cannot do for fp16 gradients, and torch.optim.AdamW could only in half.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from .base import DEVICE, MasterOptimizer, class_in_front, refuse_sparse
from .kernels.slots import Slot
from .masters import MasterWeights
from .pieces import dense
from .ready import Ready
from .shards import local, sharded_like
from .state import MOMENTS, check_saved, checked_state, moment, new_state, to_fp32
from .storage import HALF_DTYPES, MasterStorage, MomentStorage, master_storage, moment_storage

KEPT_TURNS = 8
"""So many times all parameters is what is kept ready at most, where another choice of them has gradients each time."""


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
        master_weights: `"split"`: 2 bytes beside each half weight, exact; `"float32"`: a plain copy, 4 bytes;
            `"split8"`: 1 byte, lossy.
        optimizer_state: how the moments are stored: `"float32"`: 8 bytes for both; `"bfloat16"`: 4; `"8bit"`: just
            over 2.
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
        _check_settings({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.storage: MasterStorage = master_storage(master_weights)
        self.moments: MomentStorage = moment_storage(optimizer_state)
        self.masters = MasterWeights()
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        if masters is not None:
            self._write_masters(list(masters))

    @classmethod
    def adopt(
        cls, optimizer: Optimizer, masters: MasterWeights, master_weights: str, optimizer_state: str = "float32"
    ) -> "MasterAdamW":
        """Make this very `torch.optim.Adam` or `AdamW` object a MasterAdamW, until `release`.

        Its groups, state, hooks, schedulers and every reference to it stay what they are; the class changes.

        Args:
            optimizer: of exactly the class Adam or AdamW. Adam keeps its weight decay in the gradient.
            masters: the masters of its parameters, shared by all that knows them.
            master_weights: how they are to be stored.
            optimizer_state: how the moments are.
        """
        for group in optimizer.param_groups:
            _check_settings(group)
            _check_parameters(group["params"])
            _check_state(group["params"], optimizer)
        optimizer.__dict__.pop("step", None)  # the tracker of an LRScheduler, bound to the old class
        adopted: MasterAdamW = optimizer  # type: ignore[assignment]
        adopted._adopted_class = type(optimizer)
        adopted.__class__ = class_in_front(cls, type(optimizer))  # type: ignore[arg-type]
        adopted.storage, adopted.moments = master_storage(master_weights), moment_storage(optimizer_state)
        adopted.masters, adopted.masters_in_module = masters, True
        adopted._patch_step_function()
        for parameter in adopted.parameters():
            if parameter.dtype in HALF_DTYPES:
                masters.claim(parameter, adopted.storage)
        return adopted

    _adopted_class: type[Optimizer]

    def release(self) -> None:
        """Be the optimizer again that was adopted."""
        for parameter, state in self.state.items():
            self.state[parameter] = self._state_outside(parameter, state)
        for name in ("_kernels", "_ready", "stepper"):
            self.__dict__.pop(name, None)
        self.__class__ = self.__dict__.pop("_adopted_class")
        del self.storage, self.moments, self.masters, self.masters_in_module
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
        if self._stepped_by_plugin():
            return loss
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            devices = dict.fromkeys(map(DEVICE, parameters))
            for device in devices:
                own = parameters if len(devices) == 1 else [one for one in parameters if one.device == device]
                gradients = [one.grad for one in own if one.grad is not None]
                refuse_sparse(gradients)
                self._step(group, own, gradients)
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def step_some(
        self, parameters: Sequence[Tensor], group: dict[str, Any], scale: Tensor, clip_value: float | None = None
    ) -> Tensor:
        """Update some parameters of `group` in place, each by itself, whether or not others have gradients yet.

        Args:
            parameters: on one device, with gradients, which are only read; no more than a kernel takes in one launch
                (`elements_worth_a_launch`), or a single one.
            group: the parameters'.
            scale: what the gradients are divided by: float32, no dimensions.
            clip_value: the largest magnitude of an element of an unscaled gradient.

        Returns:
            `found_inf`, float32, one for each parameter: not zero where its gradient was not finite, and nothing of it
            has changed.
        """
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        refuse_sparse(gradients)
        found_inf = self._kernel(parameters[0].device).scan_each(gradients)
        self.grad_scale, self.found_inf, self.clip_value = scale, found_inf, clip_value
        try:
            self._step(group, list(parameters), gradients)
        finally:
            del self.grad_scale, self.found_inf, self.clip_value
        return found_inf

    def elements_worth_a_launch(self, device: torch.device) -> int:
        """So many elements of gradients are worth waiting for before `step_some`; 1 for any parameter by itself."""
        return self._kernel(device).elements_worth_a_launch

    def _step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Update the parameters of a group that have gradients and share a device."""
        device = parameters[0].device
        found_inf = self._found_inf(device)
        if device.type == "cpu" and found_inf is not None and found_inf.numel() == 1:
            if found_inf:
                return
            found_inf = None
        ready = self._ready_for(parameters, group["amsgrad"])
        if found_inf is None:
            torch._foreach_add_(ready.steps, 1)
        elif found_inf.dim():
            torch._foreach_add_(ready.steps, list((found_inf == 0).float().unbind()))
        else:  # with `alpha`, which only the overload for tensors has: that for numbers would wait for the device
            torch._foreach_add_(ready.steps, (found_inf == 0).float(), alpha=1)
        lr = group["lr"]
        self._kernel(device).adamw_(
            ready.slots,
            list(map(local, gradients)) if ready.sharded else gradients,
            self.storage,
            self.moments,
            self._gradient_transform(device),
            lr=lr.to(device, non_blocking=True) if isinstance(lr, Tensor) else lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            found_inf=found_inf,
        )
        self.masters.stepped(ready.half)

    _ready: dict[Hashable, Ready]
    """The newest last, by the ids of the parameters, which they keep."""

    def _ready_for(self, parameters: list[Tensor], amsgrad: bool) -> Ready:
        """All that the parameters' update needs; their state is made where there is none yet."""
        known = self.__dict__.setdefault("_ready", {})
        key = (amsgrad, *map(id, parameters))
        ready: Ready | None = known.get(key)
        if ready is None or not ready.holds(self.state):
            if ready is not None:
                known.clear()  # they keep what they were made of, and with it its memory
            slot_of = partial(self._new_slot, amsgrad=amsgrad)
            ready = known[key] = Ready(parameters, slot_of, self.state, self.masters)
            room = KEPT_TURNS * sum(len(group["params"]) for group in self.param_groups)
            while sum(map(len, known.values())) > room and len(known) > 1:
                del known[next(iter(known))]
        return ready

    def _new_slot(self, parameter: Tensor, amsgrad: bool) -> Slot:
        state = self.state[parameter]
        held = local(parameter).detach()
        weight = dense(held)
        if not state:
            state.update(new_state(parameter, weight, self.moments, amsgrad=amsgrad))
        exp_avg, exp_avg_sq, *maximum = (
            moment(state, name, weight, self.moments) for name in (MOMENTS if amsgrad else MOMENTS[:2])
        )
        return Slot(
            weight=held,
            master=self.masters.claim(parameter, self.storage) if parameter.dtype in HALF_DTYPES else None,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            max_exp_avg_sq=maximum[0] if maximum else None,
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
        # The packed entries are the live ones: new ones are made here.
        parameters = dict(enumerate(self.parameters()))
        state = state_dict["state"] = {
            index: self._state_outside(parameters[index], entry) if isinstance(entry, dict) else entry
            for index, entry in state_dict["state"].items()
        }
        if not self.masters_in_module:
            for index, parameter in parameters.items():
                if parameter.dtype in HALF_DTYPES:
                    state[index] = {**state.get(index, {}), "master": self.masters.read(parameter)}
        return state_dict

    def _state_outside(self, parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state as AdamW would hold it: FP32, and sharded as the parameter is."""
        fp32 = to_fp32(state, self.moments)
        return {name: sharded_like(value, parameter) if name in MOMENTS else value for name, value in fp32.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what AdamW or MasterAdamW saved. Moments and masters stay FP32, whatever the parameters are.

        Raises:
            ValueError: groups or shapes do not fit, or a key is missing; nothing has changed then.
        """
        parameters = list(self.parameters())
        check_saved(state_dict)
        # By position: the saved groups number the same parameters in the same order.
        saved_ids = [(saved_id, group) for group in state_dict["param_groups"] for saved_id in group["params"]]
        loaded = {}
        for parameter, (saved_id, group) in zip(parameters, saved_ids, strict=False):
            if saved_id in state_dict["state"]:
                loaded[parameter] = checked_state(
                    state_dict["state"][saved_id], parameter, saved_id, amsgrad=group.get("amsgrad", False)
                )
        self.__dict__.pop("_ready", None)  # it keeps what is now replaced
        # Not torch's own way for the state: it would cast it to the parameters' half.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, state in loaded.items():
            master = state.pop("master", None)
            if master is not None and parameter.dtype in HALF_DTYPES:
                self.masters.write(parameter, master.clone(), self.storage)
                self.masters.expect_writes(parameter, once=True)  # the module's half weights may be loaded after this
            elif master is not None:
                parameter.copy_(master)
            if state:
                self.state[parameter] = {
                    name: local(torch.as_tensor(value, dtype=torch.float32)).to(parameter.device, copy=True)
                    for name, value in state.items()
                }
                for name in MOMENTS:  # encoded one by one, so that FP32 copies of all are never there together
                    if name in state:
                        moment(self.state[parameter], name, dense(local(parameter).detach()), self.moments)

    def __getstate__(self) -> dict[str, Any]:
        names = ("storage", "moments", "masters", "_adopted_class")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names if name in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As the adopted class has it: AdamW's own would decouple the weight decay of what is an Adam."""
        own: type[Optimizer] = {**self.__dict__, **state}.get("_adopted_class", AdamW)
        own.__setstate__(self, state)


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


def _check_state(parameters: Iterable[Tensor], optimizer: Optimizer) -> None:
    """ValueError where torch has loaded moments for half parameters, which makes them half, and small ones 0."""
    for parameter in parameters:
        dtype = getattr(optimizer.state.get(parameter, {}).get("exp_avg_sq"), "dtype", torch.float32)
        if dtype in HALF_DTYPES:
            raise ValueError(
                f"{type(optimizer).__name__} comes with moments in {dtype}: its state was loaded when the parameters "
                "were half already, as they are in configure_optimizers, and torch has rounded it. Load it once the "
                "optimizer is set up: in on_train_start, by self.optimizers().load_state_dict(...), or give fit the "
                "checkpoint as ckpt_path; in Fabric, after setup_optimizers."
            )


def _is_decay_rate(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and bool(0 <= value < 1)


def _check_parameters(parameters: Iterable[Tensor]) -> None:
    """TypeError where a parameter cannot be trained with FP32 masters. Frozen ones, as of a quantized base, may be."""
    for parameter in parameters:
        trained = parameter.requires_grad or parameter.dtype == torch.float64
        if trained and parameter.dtype not in (*HALF_DTYPES, torch.float32):
            raise TypeError(
                f"A parameter of dtype {parameter.dtype} cannot be trained with FP32 masters: "
                "make it torch.float32, torch.float16 or torch.bfloat16."
            )
