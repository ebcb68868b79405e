"""Memory that is not there: allocation events of a step that runs on fake tensors.

Every operation that is dispatched is looked at once it has run: a storage among its results that was not there before
is a block, born then; the storage's death is the block's. So `FakeMemory` is a source of events like the CUDA
allocator's history, and owners, ledger and report are those of a recording on a device.

What a kernel allocates and frees within itself is not seen, since no kernel runs: it has to be told (`scratch.py`). Two
things that fakes would distort are put right:

- autograd adds up gradients in place where no one else holds them, but not while a dispatch mode is on. A sum that the
  engine makes, one operand of which dies at once, is that operand's block; but not where the first one is a view.
- a number that is read on the host (`.item()`) is known for a constant only. A floating one is taken for 1, a boolean
  for true, and noted: such numbers are logged, or tell whether all is finite. Whether something is NaN or infinite is
  known: nothing is. Whole numbers are sizes and indices, and guessing one could change the network: this is refused.
"""

import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
import torch._dynamo.eval_frame
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..collect.owners import in_backward, now_ns
from ..collect.sources import Source
from ..recording import Event

aten = torch.ops.aten
MOST_READS = 10_000
"""From one place. A loop that goes on until a number is another than was guessed would never end."""


class DataDependent(RuntimeError):
    """The step asks for a number that only a run on a device can tell."""


class FakeMemory(TorchDispatchMode, Source):
    """A dispatch mode, to be entered within a `FakeTensorMode`, that tells of storages as an allocator does.

    Args:
        block_bytes: sizes are rounded up to a multiple of it: 512 as on CUDA, 1 as on a CPU.
        workspace_bytes: a library's workspace, allocated before all else and kept; 0 for none.
        scratch: from an operation and its arguments, the bytes that its kernel needs for itself.
        amend: from an operation, its arguments and its result, the result that it would have on the device.
    """

    lists_live_blocks = True

    def __init__(
        self,
        block_bytes: int = 1,
        workspace_bytes: int = 0,
        scratch: Callable[[Any, Any], int] = lambda func, args: 0,
        amend: Callable[[Any, Any, Any], Any] = lambda func, args, result: result,
    ) -> None:
        super().__init__()
        self._scratch, self._amend = scratch, amend
        self._block_bytes = block_bytes
        self._addresses = 0
        self._blocks: dict[int, _Fake] = {}
        """By the address of the storage object itself."""
        self._sum: tuple[_Fake, set[int]] | None = None
        """A sum that the engine has just made, whose allocation is not told yet; and its operands' storages."""
        self._events: list[Event] = []
        self._start: list[Event] = []
        self._recording = False
        self.workspace_bytes = [workspace_bytes] if workspace_bytes else []
        self._workspace = self._event(self._new_address(), workspace_bytes) if workspace_bytes else None
        self.guesses: dict[str, int] = {}
        """Where numbers were read on the host that are not known: how often."""

    # -- a source of events -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._tell_of_sum()
        self._start = self.live_blocks()
        self._events = []
        self._recording = True

    def stop(self) -> tuple[list[Event], list[Event]]:
        self._tell_of_sum()
        self._recording = False
        return self._start, self._events

    def abort(self) -> None:
        self._recording = False

    def event_count(self) -> int:
        return len(self._events)

    def live_blocks(self) -> list[Event]:
        blocks = [] if self._workspace is None else [self._workspace]
        return [*blocks, *(self._event(block.address, block.bytes) for block in self._blocks.values())]

    def address_of(self, storage: torch.UntypedStorage) -> int:
        block = self._blocks.get(storage._cdata)
        return 0 if block is None else block.address

    # -- what is dispatched -------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._tell_of_sum()
        if func in _HOST_READS:
            return self._read(func, args)
        if _writes_only(func) and _holds_no_constant(args[0]):
            return args[0] if func._schema.returns else None
        scratch_bytes = self._scratch(func, args)
        if scratch_bytes:
            scratch = _Fake(self._new_address(), scratch_bytes, None)
            self._tell(scratch)
        result = self._amend(func, args, func(*args, **(kwargs or {})))
        if func is aten.add.Tensor and _may_be_in_place(args[0]):
            self._summed(result, args[:2])
            return result
        if func in _NOT_FINITE:
            _make_constant(result, False)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._see(tensor.untyped_storage())
        if scratch_bytes:
            self._tell_of_free(scratch)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        known = self._blocks.get(key)
        if known is not None:
            if known.bytes == size:
                return
            self._freed(key, known)  # resized
        if size:
            block = _Fake(self._new_address(), size, weakref.ref(storage, lambda _: self._died(key)))
            self._blocks[key] = block
            self._tell(block)

    def _summed(self, result: torch.Tensor, operands: tuple[Any, ...]) -> None:
        storage = result.untyped_storage()
        key = storage._cdata
        if key in self._blocks or not storage.nbytes():
            return
        block = _Fake(0, storage.nbytes(), weakref.ref(storage, lambda _: self._died(key)))
        block.born_ns = now_ns()
        self._blocks[key] = block
        self._sum = block, {one.untyped_storage()._cdata for one in operands if isinstance(one, FakeTensor)}

    def _tell_of_sum(self) -> None:
        """The sum was made beside its operands after all."""
        if self._sum is not None:
            block, _ = self._sum
            self._sum = None
            block.address = self._new_address()
            self._tell(block, block.born_ns)

    def _died(self, key: int) -> None:
        block = self._blocks.get(key)
        if block is None:
            return
        if self._sum is not None:
            total, operands = self._sum
            if key in operands and block.bytes == total.bytes:
                self._sum = None
                total.address = block.address
                del self._blocks[key]
                return
            if block is total:
                self._tell_of_sum()
        self._freed(key, block)

    def _freed(self, key: int, block: "_Fake") -> None:
        del self._blocks[key]
        self._tell_of_free(block)

    def _tell(self, block: "_Fake", at_ns: int | None = None) -> None:
        if self._recording:
            self._events.append(self._event(block.address, block.bytes, at_ns))

    def _tell_of_free(self, block: "_Fake") -> None:
        if self._recording:
            self._events.append(Event(now_ns(), block.address, 0, 0))

    def _event(self, address: int, size: int, at_ns: int | None = None) -> Event:
        rounded = -(-size // self._block_bytes) * self._block_bytes
        return Event(now_ns() if at_ns is None else at_ns, address, rounded, size)

    def _new_address(self) -> int:
        self._addresses += 1
        return self._addresses

    # -- numbers read on the host -------------------------------------------------------------------------------

    def _read(self, func: Any, args: tuple[Any, ...]) -> Any:
        tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        values = [tensor.constant if isinstance(tensor, FakeTensor) else tensor for tensor in tensors]
        if all(value is not None for value in values):
            with _disable_current_modes():
                return func(*values)
        dtype = torch.bool if func is aten.equal.default else tensors[0].dtype
        where = _reader()
        if dtype is not torch.bool and not dtype.is_floating_point:
            raise DataDependent(_WHOLE_NUMBER.format(where or _LOOP))
        if where is not None:
            self.guesses[where] = self.guesses.get(where, 0) + 1
            if self.guesses[where] > MOST_READS:
                raise DataDependent(f"{where} reads numbers on the host again and again")
        return True if dtype is torch.bool else 1.0


class FakeFunctions(TorchFunctionMode):
    """Within it fake tensors can be deep-copied, where torch would copy memory that is not there, be written as
    numbers (`f"{loss:.3f}"`), and say why they cannot become arrays or whole numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _SPECIAL or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.__format__:  # a text, on which no memory depends: any number will do
            known = args[0].constant
            return func(*args) if args[0].dim() else format(1 if known is None else known.item(), args[1])
        if func in _TO_WHOLE_NUMBER:
            if args[0].constant is not None:
                return func(*args)
            raise DataDependent(_WHOLE_NUMBER.format(_reader() or _LOOP))
        if func is not torch.Tensor.__deepcopy__:
            raise DataDependent(f"{_reader() or _LOOP} makes a NumPy array of a tensor")
        tensor, memo = args
        if id(tensor) not in memo:
            copy = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, tensor.requires_grad)
            memo[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]


class _Fake:
    """A storage that is alive."""

    __slots__ = ("address", "born_ns", "bytes", "reference")

    def __init__(self, address: int, size: int, reference: Any) -> None:
        self.address = address
        self.bytes = size
        self.reference = reference
        self.born_ns = 0


_WRAPPERS = (torch._compile.__file__, torch._dynamo.eval_frame.__file__)
"""What torch puts round every `__torch_dispatch__`."""
_MACHINERY = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_TRAINERS = tuple(
    str(Path(package.__file__ or "").parent) for package in (lightning, sys.modules[__name__.partition(".")[0]])
)
_TO_WHOLE_NUMBER = (torch.Tensor.__int__, torch.Tensor.__index__)
_SPECIAL = (
    *_TO_WHOLE_NUMBER,
    torch.Tensor.__format__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
)
_WHOLE_NUMBER = "{} reads a whole number from a tensor on the host"
_LOOP = "the training loop"
_NOT_FINITE = (aten.isnan.default, aten.isinf.default)
_HOST_READS: frozenset[Callable[..., Any]] = frozenset({aten._local_scalar_dense.default, aten.equal.default})


@cache
def _writes_only(func: Any) -> bool:
    """Whether an operation does nothing but write to its first argument, which it returns: `add_`, `_foreach_mul_`.

    Then there is nothing to learn from it about memory, and much time to be saved.
    """
    schema = func._schema
    name = schema.name.rpartition("::")[2]
    arguments = schema.arguments
    return (
        name.endswith("_")
        and not name.endswith("__")
        and torch.Tag.inplace_view not in func.tags
        and name not in ("resize_", "resize_as_", "set_")
        and bool(arguments)
        and [argument.is_write for argument in arguments].count(True) == 1
        and arguments[0].is_write
        and len(schema.returns) <= 1
    )


def _holds_no_constant(written: Any) -> bool:
    """Whether no tensor that is written to has a value that is known, and would be known no more."""
    tensors = written if isinstance(written, list | tuple) else [written]
    return all(isinstance(tensor, FakeTensor) and tensor.constant is None for tensor in tensors)


def _make_constant(tensor: FakeTensor, value: bool) -> None:
    """Every element of `tensor` is known to be `value`."""
    with _disable_current_modes():
        tensor.constant = torch.tensor(value).expand(tensor.shape)
    tensor.fake_mode.fake_tensor_converter.add_constant_storage_mapping(tensor)


def _may_be_in_place(summand: Any) -> bool:
    """Whether the autograd engine adds gradients up, the first of which is no view: of a view there is a base as well,
    so that its memory is someone else's too. The gradient of a linear layer's weight is one: a product, transposed."""
    summed = in_backward() and not torch.is_grad_enabled() and _called_by_engine()
    return summed and isinstance(summand, torch.Tensor) and not summand._is_view()


def _called_by_engine() -> bool:
    """Whether no Python code lies between the autograd engine and the dispatch of this operation."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename in _WRAPPERS:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _reader() -> str | None:
    """Who asks for a number: `file.py:12`; None where that is Lightning or this package, whose reads are known."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code.co_name == "__torch_function__":  # of a mode: it hands on what another asks for
            frame = frame.f_back
            continue
        if file.startswith(_TRAINERS):
            return None
        if not file.startswith(_MACHINERY):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return None
