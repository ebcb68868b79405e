"""What every optimizer over master weights can do, whatever its rule: `MasterAdamW` and the bridge build on it."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .kernels import Kernel, kernel_for
from .kernels.slots import GradientTransform
from .masters import MasterWeights
from .shards import Layout, found_anywhere, layout, local, norm_over_shards

DEVICE, LAYOUT = attrgetter("device"), attrgetter("layout")


class Scan(NamedTuple):
    """What one look at all gradients of an optimizer found: float32 without dimensions, on the device."""

    found_inf: Tensor
    """1 if any element is inf or NaN."""
    norm: Tensor | None
    """The Euclidean norm of all gradients as they are, still scaled, where it was wanted."""


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

    stepper: Callable[[Any], bool] | None = None
    """Of one that a plugin has adopted: what scans, unscales and steps it, or skips. False where it leaves that be."""
    masters: MasterWeights
    masters_in_module: bool = False
    """Whether the module's own state_dict holds the masters, so that the optimizer's need not."""

    def master_params(self) -> list[Tensor]:
        """The FP32 master weights, in parameter order. Read only: some are what is stored, others decoded copies."""
        return [self.masters.read(parameter) for parameter in self.parameters()]

    def parameters(self) -> Iterator[Tensor]:
        """The parameters of all groups, in order."""
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _stepped_by_plugin(self) -> bool:
        """Let the plugin take a step that was called past it: it knows the loss scale. False where this is its call."""
        if self.stepper is None or "grad_scale" in self.__dict__ or next(self.parameters(), None) is None:
            return False
        return self.stepper(self)

    def scan_gradients(self, *, norm: bool) -> Scan:
        """Look once at all gradients, as they are. What is found is on the device of the first one.

        Args:
            norm: whether the Euclidean norm over all of them is wanted.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        gradients = [gradient for parameter in self.parameters() if (gradient := parameter.grad) is not None]
        refuse_sparse(gradients)
        alike = _by_place(gradients)
        if not alike:
            return Scan(*self._scan(next(self.parameters()).device, [], norm=norm))
        scans = {key: self._scan(key[0], held, norm=norm) for key, held in alike.items()}
        if list(scans) == [(gradients[0].device, None)]:
            return Scan(*scans.popitem()[1])
        first = gradients[0].device
        found_inf = torch.stack([found.to(first) for found, _ in scans.values()]).amax()
        found_inf = found_anywhere(found_inf, [spread for _, spread in scans])
        norms = [norm_over_shards(part, key[1]).to(first) for key, (_, part) in scans.items() if part is not None]
        return Scan(found_inf, torch.linalg.vector_norm(torch.stack(norms)) if norm else None)

    def _scan(self, device: torch.device, gradients: list[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]:
        """The same of what is here, on one device; there may be nothing."""
        if any(map(Tensor.numel, gradients)):
            return self._kernel(device).scan_gradients(gradients, norm=norm)
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return zero, zero if norm else None

    def memory_categories(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """For the memory profiler: which tensor beside the optimizer's state is what, and whose."""
        owned = set(self.parameters())
        for parameter, stored in self.masters:
            if parameter in owned:
                yield "master_weights", stored, parameter
        for kernel in self.__dict__.get("_kernels", {}).values():
            for table in kernel.tables():
                yield "optimizer_state", table, None

    _kernels: dict[torch.device, Kernel]

    def _kernel(self, device: torch.device) -> Kernel:
        """What does the work on a device. A kernel keeps tables between steps: each optimizer has its own."""
        kernels = self.__dict__.setdefault("_kernels", {})
        if device not in kernels:
            numel = sum(local(parameter).numel() for parameter in self.parameters() if parameter.device == device)
            kernels[device] = kernel_for(device, numel)
        kernel: Kernel = kernels[device]
        return kernel

    def _gradient_transform(self, device: torch.device) -> GradientTransform:
        scale, clip_value = getattr(self, "grad_scale", None), getattr(self, "clip_value", None)
        if scale is None:
            return GradientTransform(1.0, clip_value)
        if device.type == "cpu":
            return GradientTransform(1.0 / float(scale), clip_value)
        return GradientTransform(scale.to(device, non_blocking=True).reciprocal(), clip_value)

    def _found_inf(self, device: torch.device) -> Tensor | None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        found_inf = found_inf.to(device, non_blocking=True)
        return found_inf.reshape(()) if found_inf.numel() == 1 else found_inf


@cache
def class_in_front(front: type[Any], adopted: type[Any]) -> type[Any]:
    """The class of an adopted optimizer, one for each of the user's. By its name LearningRateMonitor names metrics."""
    # Local by its qualified name too: else LightningCLI would find two classes for `--optimizer Adam`.
    made_here = f"{class_in_front.__qualname__}.<locals>.{adopted.__name__}"
    bases: tuple[type[Any], ...] = (front, adopted)
    # An object takes another class only if both have added a __dict__ to the same base: `object`, as the front, or
    # what comes before Optimizer in `class Theirs(ABC, Optimizer)`.
    bare = _without_dict(adopted)
    if bare is not object:
        bases = (type(bare.__name__, (bare,), {}), *bases)
    return type(adopted.__name__, bases, {"__qualname__": made_here})


def _without_dict(kind: type[Any]) -> type[Any]:
    """The class that the instances of `kind` are laid out like, but for the attributes that anyone may set."""
    base = kind.__base__
    while base is not None and base.__dictoffset__:
        base = base.__base__
    return base or object


def refuse_sparse(gradients: Sequence[Tensor]) -> None:
    """RuntimeError where one of the gradients is not a plain strided tensor."""
    for layout_name in set(map(LAYOUT, gradients)) - {torch.strided}:
        raise RuntimeError(
            f"A gradient has the layout {layout_name}; the update takes dense ones only: use sparse=False in "
            "nn.Embedding or nn.EmbeddingBag."
        )


def _by_place(gradients: list[Tensor]) -> dict[tuple[torch.device, Layout | None], list[Tensor]]:
    """What this process holds of the gradients, by device and by how they are spread."""
    if set(map(type, gradients)) == {Tensor} and len(set(map(DEVICE, gradients))) == 1:  # asked faster than one by one
        return {(gradients[0].device, None): gradients}
    alike: dict[tuple[torch.device, Layout | None], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.device, layout(gradient)), []).append(local(gradient))
    return alike


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside what the Trainer or Fabric hands to users: there it is a property.

    One of the user's own may keep another in an attribute of that name, and is itself the optimizer.
    """
    return optimizer.optimizer if isinstance(getattr(type(optimizer), "optimizer", None), property) else optimizer
