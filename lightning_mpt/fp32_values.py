"""The FP32 values of a module that is half: what its `state_dict` gives, and takes, meanwhile.

Those of parameters are their masters. Those of buffers are the original ones, kept on the host, unless training has
written to the half ones. All of it happens in hooks of the single modules, so that it holds for any part of the whole;
and a part that is copied or pickled in training takes the FP32 values of its own along, and nothing else.
"""

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .half_range import saturated
from .masters import MasterWeights
from .shards import share
from .storage import is_float, is_half, master_storage

PLAIN = master_storage("float32")


class FP32Values:
    """The FP32 values of half parameters and buffers.

    Args:
        dtype: float16 or bfloat16.
        masters: keeps those of the parameters.

    Attributes:
        names: the half parameters with their names, tied ones once.
        parts: the modules whose own parameters and buffers are half.
        whole: the module that all of them are in.
        loaded_in_half: names of parameters for which `load_state_dict` was given nothing but their own half values, as
            torch does where it loads a whole file into sharded parameters: `reload` has the rest.
    """

    def __init__(self, dtype: torch.dtype, masters: MasterWeights) -> None:
        self.names: dict[nn.Parameter, str] = {}
        self.parts: set[nn.Module] = set()
        self.whole: nn.Module | None = None
        self.loaded_in_half: set[str] = set()
        self.dtype = dtype
        self._masters = masters
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._loading: dict[Tensor, Tensor] = {}
        self._decoded: dict[Tensor, tuple[int, weakref.ref[Tensor]]] = {}

    # -- buffers ------------------------------------------------------------------------------------------------

    def convert_buffers(self, part: nn.Module) -> None:
        """Make the floating buffers of one of the `parts` half."""
        self.parts.add(part)
        for name, buffer in part._buffers.items():
            if buffer is not None and is_float(buffer):
                self._buffers[part, name] = buffer.float().cpu() if is_half(buffer) else buffer.cpu()
                part._buffers[name] = saturated(buffer, self.dtype)

    def half_buffers(self) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
        """The buffers that are half: they became so, or were registered in training, as pruning does with its masks."""
        for part in self.parts:
            for name, now in part._buffers.items():
                if is_half(now):
                    yield (part, name), now  # type: ignore[misc]

    def buffer(self, key: tuple[nn.Module, str], now: Tensor) -> Tensor:
        """A buffer's FP32 value: the original one, unless there was none or training has written to the half one."""
        original = self._buffers.get(key)
        untouched = (
            original is not None and now.shape == original.shape and _alike(now.cpu(), saturated(original, self.dtype))
        )
        return original.to(now.device) if original is not None and untouched else now.float()

    def write_buffer(self, key: tuple[nn.Module, str], half: Tensor, value: Tensor) -> None:
        """Make `value` a buffer's FP32 value, and round it into the half one."""
        half.copy_(saturated(value, self.dtype))
        self._buffers[key] = value.cpu()

    # -- state_dict ---------------------------------------------------------------------------------------------

    def hook(self, part: nn.Module) -> list[Any]:
        """Make the `state_dict` of a part FP32. Gives the handles of what does it."""
        hooks = _Hooks(self, part)
        return [  # as functions of nn.Module: what torch.jit.script gives has the hooks, not the methods
            nn.Module.register_state_dict_post_hook(part, hooks),
            nn.Module._register_load_state_dict_pre_hook(part, hooks.take, with_module=True),
            nn.Module.register_load_state_dict_post_hook(part, hooks.write),
        ]

    def give(self, part: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Put the FP32 values of a part in the place of its half ones. With the whole, also of what was added to it."""
        for name, parameter in part._parameters.items():
            if parameter in self.names and prefix + name in state_dict:
                state_dict[prefix + name] = self._decode(parameter)
        for name, buffer in part._buffers.items():
            # FP32 already, where the part belongs to another converted module too.
            if buffer is not None and is_half(state_dict.get(prefix + name)) and part in self.parts:
                state_dict[prefix + name] = self.buffer((part, name), buffer)
        if part is self.whole:
            for name, value in state_dict.items():
                if name.startswith(prefix) and is_half(value):
                    state_dict[name] = value.float()

    def widen(self, collected: Any) -> None:
        """Put FP32 values where somebody collected half weights by their names, as for a file of adapters alone."""
        if not isinstance(collected, dict) or not any(map(is_half, collected.values())):
            return
        for parameter, name in self.names.items():
            value = collected.get(name)
            if not isinstance(value, Tensor) or not is_half(value) or value.shape != parameter.shape:
                continue
            if torch.equal(value.to(parameter.device), parameter):
                collected[name] = self._decode(parameter)

    def _decode(self, parameter: Tensor) -> Tensor:
        """The parameter's FP32 value; of a tied one the same tensor again, as in any state_dict, while it is in use."""
        version, reference = self._decoded.get(parameter, (None, None))
        value = reference() if reference is not None and version == parameter._version else None
        if value is None:
            value = self._masters.read(parameter)
            if value.device.type == "cuda":
                value = value.cpu()  # a whole FP32 model more might not fit the device in the middle of training
            self._decoded[parameter] = (parameter._version, weakref.ref(value))
        return value

    def take(self, part: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Note what is about to be loaded into a part."""
        for name, parameter in part._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter in self.names and isinstance(value, Tensor) and value.shape == parameter.shape:
                if value is parameter:
                    self.loaded_in_half.add(self.names[parameter])
                else:
                    self._loading[parameter] = value

    def write(self, part: nn.Module) -> None:
        """After torch has copied the loaded values into the half weights: give the masters all their bits."""
        for parameter in part._parameters.values():
            if parameter is not None and parameter in self._loading:
                value = self._loading.pop(parameter)
                self._masters.write(parameter, value.to(parameter.device, torch.float32, copy=True))

    def reload(self, path: str | Path | None, name: str | None) -> bool:
        """Give the masters of what was loaded in half the FP32 values of the file: whole tensors, by their names.

        Args:
            path: the file, if there was one.
            name: of the module's state_dict in the file; None where that is all there is.

        Returns:
            Whether it was read.
        """
        if not self.loaded_in_half or path is None or not Path(path).is_file():
            return False
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state_dict = file if name is None else file[name]
        for parameter, of_parameter in self.names.items():
            if of_parameter in self.loaded_in_half and of_parameter in state_dict:
                value = share(state_dict[of_parameter].float(), parameter)
                self._masters.drop(parameter)  # and that somebody else wrote to it, since that was torch, loading
                self._masters.write(parameter, value.to(parameter.device, copy=True), PLAIN)
                self.loaded_in_half.discard(of_parameter)
        return True

    # -- copies -------------------------------------------------------------------------------------------------

    def of_part(self, part: nn.Module) -> dict[str, Tensor]:
        """Those of a part's own parameters and buffers, by name."""
        parameters = {name: self._masters.read(p) for name, p in part._parameters.items() if p in self.names}
        buffers = {name: self._buffers[part, name] for name in part._buffers if (part, name) in self._buffers}
        return parameters | buffers

    def enter(self, part: nn.Module, values: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Take over what `of_part` gave, for a copy of that part; `parameters` are those of the copy that are half."""
        self.parts.add(part)
        for name, value in values.items():
            if name in parameters:
                self.names[parameters[name]] = name
                self._masters.write(parameters[name], value, PLAIN)
            else:
                self._buffers[part, name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "FP32Values":
        return FP32Values(self.dtype, MasterWeights())  # the hooks of each part that is copied bring their own


class _Hooks:
    """The hooks of one module."""

    def __init__(self, values: FP32Values, part: nn.Module, *, of_copy: bool = False) -> None:
        self._values, self._part, self.of_copy = values, part, of_copy

    def __call__(self, part: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        self._values.give(part, state_dict, prefix)

    def take(self, part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self._values.take(part, state_dict, prefix)

    def write(self, part: nn.Module, _: Any) -> None:
        self._values.write(part)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hooks":
        part = copy.deepcopy(self._part, memo)  # it is being copied: this looks up what it becomes
        values = copy.deepcopy(self._values, memo)
        own = {name: value.clone() for name, value in self._values.of_part(self._part).items()}
        return _entered(values, part, own, copy.deepcopy(self._half_parameters(), memo), self._of_whole())

    def __reduce__(self) -> Any:
        values = FP32Values(self._values.dtype, MasterWeights())
        own = self._values.of_part(self._part)
        return _entered, (values, self._part, own, self._half_parameters(), self._of_whole())

    def _half_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._part._parameters.items() if p is not None and p in self._values.names}

    def _of_whole(self) -> bool:
        return self._part is self._values.whole


def _entered(
    values: FP32Values, part: nn.Module, own: dict[str, Tensor], parameters: dict[str, nn.Parameter], whole: bool
) -> _Hooks:
    """The hooks of a copy of a part, whose FP32 values `own` are among `values` from now on."""
    values.enter(part, own, parameters)
    if whole:
        values.whole = part
    return _Hooks(values, part, of_copy=True)


def let_go_of_copy(part: nn.Module) -> None:
    """Where a module came into training as a copy of one: take its hooks away, and with them its FP32 values."""
    for hooks in (part._state_dict_hooks, part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps those that are given the module
            owner = getattr(hook, "__self__", hook)
            if isinstance(owner, _Hooks) and owner.of_copy:
                del hooks[key]


def _alike(half: Tensor, other: Tensor) -> bool:
    """Whether two half tensors of one shape have the same bits, NaN among them."""
    return torch.equal(half.contiguous().view(torch.int16), other.contiguous().view(torch.int16))
