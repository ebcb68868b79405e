"""Who owns an address, as seen while a step runs.

Everything here is watched from outside, by hooks that torch offers and that come off again after every step:

- parameters, buffers, gradients and optimizer state are looked up at the edges of a step;
- gradients also when they are accumulated, since they may be gone by the end of the step;
- tensors saved for backward, as autograd saves them;
- which module runs, by forward hooks; and with them the phase: `forward` when a module runs, `backward` from the first
  gradient or unpacked tensor until the autograd engine is done, `optimizer_step` from there on. A closure that runs
  forward and backward inside `Optimizer.step`, as Lightning's does, is so taken apart correctly. Where the engine gave
  no parameter its gradient (`torch.autograd.grad` of a gradient penalty, say), forward goes on after it.

An owner that knows more has a method `memory_categories()`: an optimizer, or anything given as `witnesses`. It yields
`(category, tensor, parameter or None)`, category being a value of `Category`.
"""

import time
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..category import Category
from ..figures import Duplicate
from ..ledger import BACKWARD, CLIP, FORWARD, OPTIMIZER_STEP, OUTSIDE
from ..recording import Claim, Gone, Interval, Mark
from .duplicates import DuplicateFinder
from .modules import ModuleForwards, hookable, parameter_paths, untracer
from .saved import SavedTensors
from .tensors import is_computed, parts_of, tensors_in

now_ns = time.time_ns
"""The clock of torch.profiler's events and, to its microsecond, of the CUDA allocator's history."""


class Owners:
    """Collects claims and marks about one training loop on one device.

    Args:
        module: the root module.
        optimizers: the optimizers that step it.
        device: claims are made for storages on this device alone.
        witnesses: further objects with a `memory_categories()` method.
        max_claims: how many tensors saved for backward, and runs of modules, are noted; the rest is only counted.
        find_duplicates: look for values saved in two precisions, when the first backward pass with hooks on begins.
        address_of: the address of a storage, as the source of events names it; 0 where it has none.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        device: torch.device,
        witnesses: Iterable[Any],
        *,
        max_claims: int,
        find_duplicates: bool,
        address_of: Callable[[torch.UntypedStorage], int],
    ) -> None:
        self._module = module
        self._optimizers = list(optimizers)
        self._witnesses = [*self._optimizers, *witnesses]
        self._device = device
        self._address_of = address_of
        self._handles: list[Any] = []
        self.saved = SavedTensors(self._note_saved, self._in_backward)
        self._running: list[_Run] = []
        self._phase = OUTSIDE
        self._fresh = False  # no module has run in this phase yet: what the first is given is the batch
        self._counted = True
        self._accumulated = False  # a gradient came in this phase
        self._told = False  # the autograd engine was asked to say when it is done
        self._watched: dict[int, StorageWeakRef] = {}
        self.claims: list[Claim] = []
        self.phases: list[Mark] = []
        self.modules: list[Mark] = []
        self.gone: list[Gone] = []
        self.forwards = ModuleForwards()
        self.duplicates: list[Duplicate] = []
        self.own: list[Interval] = []
        self.notes: list[str] = []
        self.dropped = 0
        """Notes on saved tensors and running modules that came after `max_claims`."""
        self._max_claims = max_claims
        self._finds_duplicates = find_duplicates
        self._finder: DuplicateFinder | None = None  # within the forward pass that is looked through

    # -- a step begins and ends ---------------------------------------------------------------------------------

    def begin_step(self, *, counted: bool = True) -> None:
        """A step begins; its first phase is `forward`. Of one that is not counted, forward passes are not either."""
        self._counted = counted
        # Anew every step: parameters may be replaced, optimizers given others.
        self._paths = parameter_paths(self._module, self._optimizers)
        self.claim_lasting()
        self._told = False
        self._enter(FORWARD)

    def install(self) -> None:
        """Put the hooks on."""
        if self._finds_duplicates:
            self._finder = DuplicateFinder()
            for parameter, path in self._paths.items():
                for part in self._parts_here(parameter):
                    self._finder.add(part, path)
        untraced = untracer(self._module)
        self.saved.put_on(untraced)
        for path, module in hookable(self._module):
            self._handles.append(module.register_forward_pre_hook(self._enterer(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        gradient = untraced(self._gradient)
        for parameter in self._paths:
            if parameter.requires_grad and parameter.is_leaf:
                with torch._C.DisableTorchFunctionSubclass():  # else a lazy parameter refuses
                    self._handles.append(parameter.register_post_accumulate_grad_hook(gradient))
                # Another hook may use the gradient up and free it: those that were there go to the end. (Autograd reads
                # the plain dictionary, so OrderedDict.move_to_end would change nothing.)
                hooks = parameter._post_accumulate_grad_hooks
                assert hooks is not None
                for key in list(hooks)[:-1]:
                    hooks[key] = hooks.pop(key)
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._step_begins))

    def end_step(self) -> None:
        """The step is over: what follows is between steps."""
        self.claim_lasting()
        self.remove()
        self._enter(OUTSIDE)

    def remove(self) -> None:
        """Take all hooks off again. Does nothing where none is on."""
        while self._running:
            joined = self._running.pop().joined
            if joined is not None:
                joined.__exit__()
        self._finder = None
        self.saved.take_off()
        while self._handles:
            self._handles.pop().remove()

    # -- claims -------------------------------------------------------------------------------------------------

    def claim(self, category: Category, tensor: torch.Tensor, module: str | None, *, watch: bool = False) -> None:
        """`tensor`'s storage belongs to `category` and to the module at path `module` (None: to no module)."""
        computed = is_computed(tensor)
        for part in self._parts_here(tensor):
            storage = part.untyped_storage()
            address = self._address_of(storage)
            shape, dtype = tuple(part.shape), str(part.dtype).removeprefix("torch.")
            self.claims.append(Claim(now_ns(), address, storage.nbytes(), category, module, shape, dtype, computed))
            if watch and address not in self._watched:
                self._watched[address] = StorageWeakRef(storage)

    @property
    def kept(self) -> int:
        """How many claims and marks are kept."""
        return len(self.claims) + len(self.modules)

    @property
    def addresses(self) -> Container[int]:
        """Of the storages that were owned when last looked at."""
        return self._watched

    def _parts_here(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """The plain tensors that hold `tensor`'s data, as far as they have memory on this device."""
        for part in parts_of(tensor):
            if part.device.type != self._device.type:
                continue
            if self._device.index is not None and part.device.index != self._device.index:
                continue
            storage = part.untyped_storage()
            # No address: meta, or freed by resizing, as FSDP does.
            if storage.nbytes() and self._address_of(storage):
                yield part

    def claim_inputs(self, batch: Any) -> None:
        """Every tensor in `batch`, whatever it is nested in, is an input, unless autograd saw it made."""
        for tensor in tensors_in(batch):
            if not is_computed(tensor):
                self.claim(Category.INPUTS, tensor, "", watch=True)
                if tensor.requires_grad and tensor.is_leaf:  # then it gets a gradient of its own
                    self._handles.append(tensor.register_post_accumulate_grad_hook(self._gradient))

    def claim_lasting(self) -> None:
        """Claim what outlives a step: parameters, gradients, buffers, optimizer state, and what the witnesses say."""
        for parameter, path in self._paths.items():
            self.claim(Category.WEIGHTS, parameter, path, watch=True)
            self._claim_gradient(parameter, path, watch=True)
        for path, module in self._module.named_modules():
            for buffer in module._buffers.values():
                if buffer is not None:
                    self.claim(Category.BUFFERS, buffer, path, watch=True)
        for witness in self._witnesses:
            self._claim_testimony(witness)
        for optimizer in self._optimizers:
            for key, state in optimizer.state.items():
                path = self._paths.get(key) if isinstance(key, torch.nn.Parameter) else None
                for tensor in tensors_in(state):
                    self.claim(Category.OPTIMIZER_STATE, tensor, path, watch=True)

    def _claim_gradient(self, parameter: torch.Tensor, module: str | None, *, watch: bool = False) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        # A bucket of DistributedDataParallel, of which the gradients of several modules are views, is no module's.
        shared = any(part.untyped_storage().nbytes() > part.nbytes for part in self._parts_here(gradient))
        self.claim(Category.GRADIENTS, gradient, None if shared else module, watch=watch)

    def _claim_testimony(self, witness: Any) -> None:
        categories = getattr(witness, "memory_categories", None)
        if categories is None:
            return
        for name, tensor, parameter in categories():
            path = self._paths.get(parameter) if parameter is not None else None
            self.claim(Category(name), tensor, path, watch=True)

    def parameter_count(self) -> int:
        """Number of scalar parameters, those of tied modules once, those that no batch has made yet not at all."""
        self._paths = parameter_paths(self._module, self._optimizers)
        return sum(parameter.numel() for parameter in self._paths if not is_lazy(parameter))

    def optimizer_names(self) -> list[str]:
        """The optimizers' classes; of one that is wrapped, as Lightning's Fabric does, the class inside."""
        return [type(getattr(optimizer, "optimizer", optimizer)).__name__ for optimizer in self._optimizers]

    def _look_for_gone(self) -> None:
        """Note which of the watched storages have died since the last look."""
        for address, storage in list(self._watched.items()):
            if storage.expired():
                del self._watched[address]
                self.gone.append(Gone(now_ns(), address))

    # -- phases and modules -------------------------------------------------------------------------------------

    def _enter(self, phase: str, since_ns: int | None = None) -> None:
        self._look_for_gone()
        self._fresh = phase == FORWARD and self._phase != BACKWARD  # else it goes on
        self._phase = phase
        self._accumulated = False
        self.phases.append(Mark(now_ns(), phase, since_ns))

    def begin_phase(self, name: str) -> None:
        """The phase `name` begins now."""
        if name == BACKWARD:
            self._compare_saved()
            self.modules.append(Mark(now_ns(), None))
        if name != self._phase:
            self._enter(name)

    def _in_backward(self) -> None:
        """Something happened that happens in backward only."""
        if self._phase != BACKWARD:
            # The first sign of backward comes a little late: the gradient of a mean is made before anything saved is
            # looked at. It began at some time since the last sign of forward.
            signs: list[Mark | Claim] = [self.phases[-1], *self.modules[-1:], *self.claims[-1:]]
            self._compare_saved()
            self._enter(BACKWARD, since_ns=max(sign.time_ns for sign in signs))
            self.modules.append(Mark(now_ns(), None))
        if in_backward() and not self._told:
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)
            self._told = True

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runs_forward = kwargs.get("closure", args[1] if len(args) > 1 else None) is not None
        if runs_forward or in_backward():
            return
        if self._phase != OPTIMIZER_STEP:
            self._enter(OPTIMIZER_STEP)
        for group in optimizer.param_groups:  # a loop may set gradients itself, and be done with them in this step
            for parameter in group["params"]:
                self._claim_gradient(parameter, self._paths.get(parameter))

    def _leave_backward(self) -> None:
        self._told = False
        if self._phase == BACKWARD:
            self._enter(OPTIMIZER_STEP if self._accumulated else FORWARD)

    def _enterer(self, path: str) -> Any:
        def enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # traced into a compiled graph, this hook must be nothing
                return
            if self._phase in (CLIP, OPTIMIZER_STEP) and not in_backward():
                self._enter(FORWARD)
            if self._fresh and not in_backward():
                self._fresh = False
                self.claim_inputs((args, kwargs))
            joined = self.saved.join_recomputation() if in_backward() else None
            began_ns = now_ns()
            self._running.append(_Run(path, joined, began_ns, counted=self._counted and not in_backward()))
            self._mark_module(began_ns, path)

        return enter

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        ended_ns = now_ns()
        self.saved.look_in_selective_checkpoints()
        if self._running:
            run = self._running.pop()
            if run.joined is not None:
                run.joined.__exit__()
            if run.counted:
                self.forwards.add(run.path, ended_ns - run.began_ns, output)
        self._mark_module(ended_ns, self._module_running())

    def _mark_module(self, time_ns: int, path: str | None) -> None:
        if self.kept < self._max_claims:
            self.modules.append(Mark(time_ns, path))
        else:
            self.dropped += 1

    def _module_running(self) -> str | None:
        return self._running[-1].path if self._running else None

    # -- what autograd does -------------------------------------------------------------------------------------

    def _note_saved(self, tensor: torch.Tensor) -> None:
        module = self._module_running()
        if self.kept < self._max_claims:
            self.claim(Category.ACTIVATIONS, tensor, module)
        else:
            self.dropped += 1
        if self._finder is not None:
            for part in self._parts_here(tensor):
                self._finder.add(part, module)

    def _compare_saved(self) -> None:
        """Look for duplicates, once: now that the forward pass has saved all that it saves, and nothing is used yet."""
        finder, self._finder = self._finder, None
        if finder is None:
            return
        self._finds_duplicates = False
        began_ns = now_ns()
        try:
            self.duplicates = finder.find()
        except RuntimeError as error:  # out of memory, say: training goes on without this list
            self.notes.append(f"Values saved in two precisions were not looked for: {str(error).splitlines()[0]}")
        self.own.append(Interval(began_ns, now_ns()))

    def _gradient(self, parameter: torch.Tensor) -> None:
        self._in_backward()
        self._accumulated = True
        self._claim_gradient(parameter, self._paths.get(parameter, ""))  # type: ignore[call-overload]  # "": a batch's


class _Run(NamedTuple):
    """A module that is running, and the saved-tensor hooks that were put on for it."""

    path: str
    joined: torch.autograd.graph.saved_tensors_hooks | None
    began_ns: int
    counted: bool


def in_backward() -> bool:
    """Whether the autograd engine runs, on this thread, a backward pass."""
    return torch._C._current_graph_task_id() != -1
