"""What autograd saves for backward, and when it takes it up again: seen through `saved_tensors_hooks`.

The pack hook gives the tensor itself to the graph, so nothing is copied or kept longer than it would be. The innermost
hooks alone apply, so these must be the outermost: a user's own, or a checkpoint's, stay in force within.

`torch.func.grad`, `vjp`, `jacrev` and `hessian` refuse to run where any such hooks are on: they ask for that by
`torch.autograd.graph.disable_saved_tensors_hooks`, and so may anyone. There is no asking autograd beforehand, so while
these hooks are on, that function is replaced by one that takes them off first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

from .tensors import tensors_in, version_of

UNSEEN = (
    "What autograd saves within torch.func.grad, vjp, jacrev and hessian, or where saved-tensor hooks are disabled "
    "otherwise, it tells no one: it is unattributed."
)

_refuse = torch.autograd.graph.disable_saved_tensors_hooks


class SavedTensors:
    """Tells of tensors saved for backward, on this thread, from `put_on` until `take_off`.

    Args:
        saved: called with every tensor that autograd saves.
        used: called when autograd takes one up again.
    """

    def __init__(self, saved: Callable[[torch.Tensor], None], used: Callable[[], None]) -> None:
        self._saved = saved
        self._used = used
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._stands_aside = False
        self._selective: Callable[[], object] = lambda: None  # the selective checkpoint that was last looked at, weakly
        self._told: set[int] = set()  # ids of what it keeps
        self.stood_aside = False
        """Whether autograd saved anything, at any time, that could not be seen."""

    def put_on(self, untraced: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put the hooks on, each with `untraced` round it."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(untraced(self._pack), untraced(self._unpack))
        self._stands_aside = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
        self.stood_aside |= self._stands_aside
        if not self._stands_aside:
            self._hooks.__enter__()
        torch.autograd.graph.disable_saved_tensors_hooks = self._stand_aside

    def take_off(self) -> None:
        """Take the hooks off again. Does nothing where none is on."""
        hooks, self._hooks = self._hooks, None
        if hooks is None:
            return
        torch.autograd.graph.disable_saved_tensors_hooks = _refuse
        if not self._stands_aside:
            hooks.__exit__()

    @contextmanager
    def _stand_aside(self, error_message: str) -> Iterator[None]:
        hooks = self._hooks
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None or top is None or top[0] is not hooks.pack_hook:
            # On another thread, under hooks of the user's own (which torch refuses), or aside already.
            with _refuse(error_message):
                yield
            return
        hooks.__exit__()
        self._stands_aside = self.stood_aside = True
        try:
            with _refuse(error_message):
                yield
        finally:
            self._stands_aside = False
            if self._hooks is hooks:  # the step may have ended within
                hooks.__enter__()

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        self._saved(tensor)
        return tensor, version_of(tensor)

    def _unpack(self, packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        self._used()
        tensor, version = packed
        now = version_of(tensor)
        if now != version:  # autograd leaves this check out where there are hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {now}; expected version {version} instead. "
                "Hint: torch.autograd.set_detect_anomaly(True) finds the operation that failed."
            )
        return tensor

    def join_recomputation(self) -> torch.autograd.graph.saved_tensors_hooks | None:
        """Where a checkpoint runs its modules again, in backward, see what it saves, until these hooks are exited.

        `torch.utils.checkpoint` puts its own saved-tensor hooks over these: at first ones that save nothing, and in
        backward ones that keep what is computed again.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is None or not getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook."):
            return None
        keep, give = hooks

        def pack(tensor: torch.Tensor) -> Any:
            self._saved(tensor)
            return keep(tensor)

        joined = torch.autograd.graph.saved_tensors_hooks(pack, give)
        joined.__enter__()
        return joined

    def look_in_selective_checkpoints(self) -> None:
        """Where a selective checkpoint runs its modules, in forward, tell of what it keeps for backward.

        It sets results of operations aside, by a dispatch mode: no saved-tensor hook is told of them.
        """
        if not torch._C._len_torch_dispatch_stack():
            return
        for mode in _get_current_dispatch_mode_stack():
            if not isinstance(mode, _CachingTorchDispatchMode):
                continue
            if self._selective() is not mode:
                self._selective, self._told = ref(mode), set()
            for tensor in tensors_in(mode.storage):
                if id(tensor) not in self._told:
                    self._told.add(id(tensor))
                    self._saved(tensor)
