"""A module in half precision that is FP32 seen from outside.

`ConvertedModule` casts the parameters and buffers of a module in place, so that tied weights stay tied and every
reference stays good, and keeps the FP32 values in `MasterWeights`. While the module is half, `state_dict()` gives, and
`load_state_dict()` takes, FP32 values, of the whole module or of any part. `restore` makes it FP32 again.

What stays FP32 within it, such as norms with running statistics, is decided in `fp32_modules.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .fp32_modules import RUNNING_NORMS, kept_in_fp32, meet_half
from .fp32_values import PLAIN, FP32Values, let_go_of_copy
from .masters import MasterWeights
from .shards import any_sharded, local, replace, sharded_groups
from .storage import HALF_DTYPES, is_float, is_half

DTYPE = attrgetter("dtype")


class ConvertedModule:
    """A module whose floating parameters and buffers are half, and what undoes that.

    Args:
        module: changed in place, on whatever device it is.
        dtype: float16 or bfloat16.
        masters: is given the FP32 value of every parameter that becomes half.
        fp32_modules: module types that stay FP32, with all that is in them.

    Attributes:
        was_half: names of parameters that were half already; their masters start from those values.
        half_norms: names of norms with running statistics that become half, statistics too.
        values: the FP32 values, as `state_dict` gives them.

    Raises:
        TypeError: a parameter is float64, or complex and not frozen.
        ValueError: a weight is inf or NaN, or beyond `dtype`'s range; a layer gives sparse gradients;
            or FSDP2 has half and other parameters in one group. The module is then as it was.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        masters: MasterWeights,
        fp32_modules: tuple[type[nn.Module], ...] = RUNNING_NORMS,
    ) -> None:
        self.module = module
        self._dtype = dtype
        self._masters = masters
        self._fp32_modules = fp32_modules
        self.values = FP32Values(dtype, masters)
        self.values.whole = module
        self._met = set(module.modules())
        """All modules that there were; others may be added in training."""
        self._handles: list[Any] = []
        kept = kept_in_fp32(module, fp32_modules)
        stays = {id(tensor) for part in kept for tensor in part.parameters(recurse=False)}
        self._parameters = self.values.names = {
            parameter: name
            for name, parameter in module.named_parameters()
            if is_float(parameter) and id(parameter) not in stays
        }
        self._check()
        self.half_norms = [
            name
            for name, part in module.named_modules()
            if isinstance(part, RUNNING_NORMS) and part not in kept and part.running_mean is not None
        ]
        self.was_half = [
            name
            for parameter, name in self._parameters.items()
            if parameter.dtype in HALF_DTYPES and parameter not in masters
        ]
        try:
            self._convert_module(kept)
        except BaseException:  # out of memory, most likely
            self.restore()
            raise

    def _convert_module(self, kept: set[nn.Module]) -> None:
        for parameter in self._parameters:
            if parameter not in self._masters:  # another module has it too, and is converted
                self._convert(parameter)
        self._handles += meet_half(self.module, kept, self._dtype)
        for part in self.module.modules():
            if part not in kept:
                self.values.convert_buffers(part)
            self._handles += self.values.hook(part)
        self._shards_changed()

    def _shards_changed(self) -> None:
        if any_sharded(list(self._parameters)):
            self.module._apply(lambda tensor: tensor)  # FSDP2 then looks at its parameters anew

    @property
    def parameters(self) -> dict[nn.Parameter, str]:
        """The half parameters with their names, tied ones once."""
        return self._parameters

    def worth_a_warning(self) -> Iterator[str]:
        """What users may not have meant, in words."""
        if self.was_half:
            yield (
                f"{len(self.was_half)} parameters ({self.was_half[0]} first) were half precision already: their FP32 "
                "masters start from the half values. Hand over the FP32 module to start from all its bits."
            )
        if self.half_norms and self._fp32_modules:
            kinds, first = ", ".join(kind.__name__ for kind in self._fp32_modules), self.half_norms[0]
            yield (
                f"fp32_modules=({kinds},) takes the place of the norms with running statistics, and "
                f"{len(self.half_norms)} of them ({first}, {type(self.module.get_submodule(first)).__name__}, first) "
                "train in half, statistics too: name their types beside it, or give fp32_modules=() for no FP32 module "
                "at all."
            )

    def take_replaced(self) -> None:
        """Parameters that were given values of another dtype, by `parameter.data = ...`, are half again.

        These values are their masters: rewinding weights (`ModelPruning`) and averages exchange them so.
        """
        if set(map(DTYPE, self._parameters)) <= {self._dtype}:
            return
        for parameter in self._parameters:
            if parameter.dtype != self._dtype:
                value = parameter.data.float()
                replace(parameter, torch.empty_like(value, dtype=self._dtype))
                self._masters.write(parameter, value.clone())

    def widen_gradients(self) -> None:
        """Half gradients that are about to be added to become FP32, so that small addends are not lost to rounding.

        To be called before backward. Where there is no gradient yet, backward makes a half one.
        """
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.dtype in HALF_DTYPES and parameter.requires_grad:
                self.give_gradient(parameter, gradient.float())

    def give_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """Make `gradient` (float32) the gradient of one of the module's parameters, half or not."""
        if parameter in self._parameters:
            parameter.grad = None
            parameter.grad_dtype = None  # any: backward may make a half one again, and so may the user
        parameter.grad = gradient

    @contextmanager
    def fp32_values(self, *, write: bool) -> Iterator[None]:
        """Within it the module has FP32 parameters and buffers, other tensors, in the place of its half ones.

        Args:
            write: afterwards the half ones and their masters become what these hold. Else they are only to be read.
        """
        halves = dict(self.values.half_buffers())
        places = [
            (part._parameters, name, p)
            for part in self.module.modules()
            for name, p in part._parameters.items()
            if p in self._parameters
        ]
        with torch.inference_mode(False):  # validation has it on, and what is made in it could not be trained
            parameters = {p: nn.Parameter(self._masters.read(p), p.requires_grad) for p in self._parameters}
            buffers = {key: self.values.buffer(key, half) for key, half in halves.items()}
        try:
            for held, name, parameter in places:
                held[name] = parameters[parameter]
            for (part, name), value in buffers.items():
                part._buffers[name] = value
            yield
        finally:
            for held, name, parameter in places:
                held[name] = parameter
            for (part, name), half in halves.items():
                part._buffers[name] = half
        if write:
            with torch.inference_mode(False):
                for parameter, value in parameters.items():
                    # Plainly, so that an average loses no bit: the optimizer stores it in its own way when it steps.
                    self._masters.write(parameter, value.detach(), PLAIN)
                for key, value in buffers.items():
                    self.values.write_buffer(key, halves[key], value)

    def narrow_gradients(self) -> None:
        """Gradients that were summed up in FP32 become half again: for a backward whose end reduces them over ranks.

        `DistributedDataParallel` reduces in the parameters' dtype, so that the sum is rounded once in any case.
        """
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                parameter.grad = parameter.grad.to(parameter.dtype)

    def restore(self) -> None:
        """Make the module FP32 again, with the values of the masters, and let go of it. Gradients are dropped."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            value = self._masters.read(parameter).to(parameter.device)
            parameter.grad = None
            replace(parameter, value)
            self._masters.drop(parameter)
        for (part, name), half in list(self.values.half_buffers()):
            part._buffers[name] = self.values.buffer((part, name), half)
        for part in self.module.modules():
            if part not in self._met:  # added in training, where half is the default, and copies are half
                self._restore_added(part)
        self.values, self._handles = FP32Values(self._dtype, self._masters), []
        self._shards_changed()

    def _restore_added(self, part: nn.Module) -> None:
        values = nn.Module.state_dict(part)  # FP32 already, where it is a copy
        let_go_of_copy(part)
        for name, parameter in part._parameters.items():
            if parameter is not None and is_half(parameter) and parameter not in self._masters:
                replace(parameter, values[name].to(parameter.device, torch.float32))
        for name, buffer in part._buffers.items():
            if buffer is not None and is_half(buffer):
                part._buffers[name] = values.get(name, buffer).to(buffer.device, torch.float32)

    def _check(self) -> None:
        for part_name, part in self.module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
                raise ValueError(
                    f"{part_name or type(part).__name__} has sparse=True, and sparse gradients cannot be unscaled and "
                    "clipped in the update: make it sparse=False."
                )
        if any_sharded(list(self.module.parameters())):
            self._check_sharded_groups()
        limit = torch.finfo(self._dtype).max
        for name, parameter in self.module.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run one batch through the lazy modules before training.")
            if parameter.is_complex() and parameter.requires_grad:
                raise TypeError(
                    f"{name} is {parameter.dtype}, and masters are kept of real parameters: keep "
                    "torch.view_as_real(...) of it as the parameter, and use torch.view_as_complex on its .float() in "
                    "forward; or freeze it."
                )
            becomes_half = parameter in self._parameters
            if becomes_half and parameter.dtype not in (*HALF_DTYPES, torch.float32):
                raise TypeError(
                    f"{name} is {parameter.dtype}; master weights are FP32 and would lose its precision in silence: "
                    "convert the module with .float(), or train with precision='64-true'."
                )
            held = local(parameter).detach()
            if held.numel() == 0 or not is_float(held):
                continue
            lowest, highest = (bound.item() for bound in torch.aminmax(held))
            largest = max(abs(lowest), abs(highest))
            if not largest < float("inf"):  # NaN too
                raise ValueError(f"{name} holds inf or NaN before the first step: start from finite weights.")
            if becomes_half and largest > limit:
                reaching_further = "use 'bf16-true', or " if self._dtype == torch.float16 else ""
                raise ValueError(
                    f"{name} holds a weight of magnitude {largest:g}, beyond the {limit:g} of {self._dtype}: "
                    f"{reaching_further}rescale the weight."
                )

    def _check_sharded_groups(self) -> None:
        """FSDP2 reduces the gradients that it has gathered together in one dtype."""
        for given, group in sharded_groups(self.module).items():
            others = {name: parameter.dtype for name, parameter in group.items() if parameter not in self._parameters}
            if 0 < len(others) < len(group):
                name, dtype = next(iter(others.items()))
                part = name.rpartition(".")[0]
                kind = type(self.module.get_submodule(part)).__name__
                call = ", ".join(owner or "the whole module" for owner in given)
                raise ValueError(
                    f"{part} ({kind}) keeps its parameters in {dtype}, and "
                    f"fully_shard({call if len(given) == 1 else f'[{call}]'}) "
                    "puts them in one group with half ones; FSDP2 takes one dtype in a group: shard it on its own "
                    f"before, by fully_shard(self.get_submodule({part!r})), "
                    f"{'with it no longer in the list, ' if part in given else ''}"
                    "or give the plugin fp32_modules=() to train it in half."
                )

    def _convert(self, parameter: nn.Parameter) -> None:
        original = parameter.data.float()  # itself where it is FP32: nothing is copied
        parameter.grad = None
        replace(parameter, torch.empty_like(original, dtype=self._dtype))
        self._masters.write(parameter, original, PLAIN)
