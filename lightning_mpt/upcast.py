"""FP32 tensors that are kept as the half values that they were cast from, until something needs them in FP32.

Callers bring logits to FP32 before they take the loss, as transformers' models do. Over a vocabulary that copy is the
largest tensor of all, and lives when the most memory is in use; yet cross entropy wants no more of it than the half
values (`cross_entropy.py`). So the copy is not made: an `Upcast` stands for it, which autograd and every caller take
for the float32 tensor that it is equal to. Views and copies of it are such tensors again. Whatever else is asked of it
is asked of the FP32 copy, which is made then.

Gradients go the same way back: that of the logits is half, and the cast would round it to half in any case. So is, for
whoever looks at it, that of the FP32 tensor.

A copy is not changed by what happens to the original later. So where the half values are about to be changed in place,
the copy is made before (`before_call`), and where that is found out only later, by the tensor's version, using it is an
error. A kernel that writes to an address, and counts no version, is not seen.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from .storage import HALF_DTYPES

SMALLEST = 2**20
"""Fewer values are not worth it."""

WIDEST = 2**13
"""A vocabulary has more classes. What is less wide is a layer's: norms and attention bring theirs to FP32 as well, and
need it there."""

KINDS = (Tensor, FakeTensor)
"""Types whose casts may wait. Parameters change with every step, and what else there is, such as DTensor, has its own
ways."""

Learn = Callable[[bool], Any]
"""Is told True when the half values were all that was wanted, False when an FP32 copy is made of them."""

INSTEAD: dict[Any, Callable[..., Any]] = {}
"""Functions of torch's that have another way for half values, which an `Upcast` goes; it gives None where it cannot."""

aten = torch.ops.aten
MOVES = frozenset(
    {aten.clone.default, aten._unsafe_view.default, aten.slice_backward.default, aten.select_backward.default}
)
"""What gives other memory with the same values in other places, and zeros."""

ANSWERS = frozenset({aten.argmax.default, aten.argmin.default})
"""What half values answer as well, as whoever counts the right ones asks."""

SAME = frozenset({aten.detach.default, aten.alias.default})
"""Views of all of it, as torch takes them of what it compiles for and expects to be of the same type."""

VIEWS = SAME | {
    aten.expand.default, aten.permute.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor,
    aten.split_with_sizes.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default,
    aten.transpose.int, aten.unbind.int, aten.unsqueeze.default, aten.view.default,
}  # fmt: skip
"""Views that show the same values in other places. All others are taken of the FP32 copy."""


class _Source:
    """What an upcast and its views share: the half values, and their FP32 copy once there is one."""

    def __init__(self, half: Tensor, learn: Learn | None) -> None:
        self.half, self._version, self.learn = half, _version(half), learn
        self.fp32 = None if half.dtype in HALF_DTYPES else half
        self.written = self.fp32 is not None
        """Whether the FP32 copy was changed, so that the half values say nothing of it any more."""

    @property
    def still_half(self) -> bool:
        return not self.written and _version(self.half) == self._version

    def in_fp32(self) -> Tensor:
        if self.fp32 is None:
            if _version(self.half) != self._version:
                raise RuntimeError(
                    f"A half tensor of shape {tuple(self.half.shape)} was brought to FP32, and then changed in place "
                    "before the FP32 values were used: change a copy of it, half.clone(), or the FP32 tensor."
                )
            self.fp32 = self.half.float()
            WAITING.discard(self)
            if self.learn is not None:
                self.learn(False)
        return self.fp32


WAITING: WeakSet[_Source] = WeakSet()
"""Those of which there is no FP32 copy yet, gradients apart."""


class Upcast(Tensor):
    """A float32 tensor that stands for the FP32 copy of a contiguous half one, or for a view of that copy.

    Args:
        source: what it shows a part of, or all.
        shown: the view, half or FP32 as they are now.
    """

    _source: _Source
    _shown: Tensor

    @staticmethod
    def __new__(cls, source: _Source, shown: Tensor) -> "Upcast":
        whole = source.in_fp32() if shown.dtype == torch.float32 else source.half
        offset = shown.storage_offset() - whole.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, shown.size(), shown.stride(), offset, dtype=torch.float32, device=shown.device
        )
        made._source, made._shown = source, shown
        return made

    @classmethod
    def of(cls, half: Tensor, learn: Learn | None = None) -> "Upcast":
        """The FP32 values of a contiguous half tensor."""
        return cls(_Source(half, learn), half)

    @property
    def half_values(self) -> Tensor | None:
        """The values in half, without a copy; None if they are no longer what this stands for."""
        if not self._source.still_half:
            return None
        return self._shown if self._shown.dtype in HALF_DTYPES else self._part_of(self._source.half)

    def in_fp32(self) -> Tensor:
        """The values in FP32: a plain tensor, of the same memory at every call."""
        if self._shown.dtype != torch.float32:
            self._shown = self._part_of(self._source.in_fp32())
        return self._shown

    def in_memory(self) -> Tensor:
        """The same, for what may write to that memory where it is not seen here."""
        self._source.written = True
        return self.in_fp32()

    @property
    def held(self) -> Tensor:
        """The values as they are by now, half or FP32."""
        return self._shown if self._source.fp32 is None else self.in_fp32()

    def memory_parts(self) -> list[Tensor]:
        """For the memory profiler: what takes memory for this."""
        return [self.held]

    def _part_of(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.size(), self.stride(), self.storage_offset() + whole.storage_offset())

    def taken_in_half(self) -> None:
        """The half values were all that was wanted."""
        if self._source.learn is not None:
            self._source.learn(True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in INSTEAD and (result := INSTEAD[func](*args, **kwargs)) is not None:
                return result
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:  # inference mode has whole functions done
            return parts
        first = args[0] if args and isinstance(args[0], cls) else None
        if first is not None and func in (VIEWS if first._source.still_half else SAME):
            views = func(first.held, *args[1:], **kwargs)
            with torch.inference_mode(first.is_inference()):  # a view made in that mode is what the whole is
                return tree_map_only(Tensor, lambda view: cls(first._source, view), views)
        if first is not None and (func in MOVES or func in ANSWERS) and (half := first.half_values) is not None:
            result = func(half, *args[1:], **kwargs)
            return result if func in ANSWERS else cls.of(result, first._source.learn)
        plain_args, plain_kwargs = tree_map_only(cls, cls.in_fp32, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        _note_writes(func, args, kwargs)
        return return_and_correct_aliasing(func, args, kwargs, result) if func._schema.is_mutable else result

    # torch.compile takes it for a wrapper of the FP32 copy.

    compiled_as = property(in_memory)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["compiled_as"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> "Upcast":
        return cls.of(inner["compiled_as"])

    def _stable_hash_for_caching(self) -> str:
        return f"{type(self).__name__} {self.size()} {self.stride()} {self.device} {self.requires_grad}"

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, expected_type: Any = None) -> Tensor:
        return self.in_fp32()

    # What reads memory past torch's dispatch, and what is to be saved, is the FP32 copy.

    def numpy(self, *, force: bool = False) -> Any:
        return self.in_memory().numpy(force=force)

    def tolist(self) -> Any:
        return self.in_fp32().tolist()

    def data_ptr(self) -> int:
        return self.in_memory().data_ptr()

    def share_memory_(self) -> Tensor:
        return self.in_memory().share_memory_()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.in_memory().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.in_fp32().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.in_fp32().__reduce_ex__(protocol)


class _ToFP32(torch.autograd.Function):
    """The cast, which is not done."""

    @staticmethod
    def forward(ctx: Any, half: Tensor, learn: Learn | None) -> Upcast:
        ctx.dtype = half.dtype
        made = Upcast.of(half.detach(), learn)
        WAITING.add(made._source)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        half = half_values(gradient) if isinstance(gradient, Upcast) and not gradient.requires_grad else None
        return gradient.to(ctx.dtype) if half is None or half.dtype != ctx.dtype else half, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.float()


def upcast(half: Tensor, learn: Learn | None = None) -> Tensor:
    """As `half.float()`, without a copy until FP32 values are needed.

    Args:
        half: float16 or bfloat16, contiguous, of one of `KINDS`; outside of torch.func.
        learn: see `Learn`.
    """
    made: Tensor = _ToFP32.apply(half, learn)
    return made


class Casts:
    """Callers' casts to FP32, which wait where the copy may never be needed. Of others it is remembered what was cast.

    Learns, by the size of a tensor's last dimension, whether cross entropy takes such tensors, for which the half
    values do. Where something else made the copy, it is made at once from then on.
    """

    def __init__(self) -> None:
        self._are_logits: dict[int, bool] = {}

    def cast(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func`, one of the functions that cast their first argument, gives."""
        half = args[0]
        if half.dtype not in HALF_DTYPES or not _may_be_logits(half):
            return func(*args, **kwargs)
        if "memory_format" not in kwargs and self._may_wait(half):
            to = func(half.detach().flatten()[:0], *args[1:], **kwargs)  # an empty tensor tells
            if isinstance(to, Tensor) and to.dtype == torch.float32 and to.device == half.device:
                return self._waiting(half)
        copy = func(*args, **kwargs)
        if isinstance(copy, Tensor) and copy.dtype == torch.float32:
            COPIES[copy] = half, half._version, copy._version
        return copy

    def to_fp32(self, half: Tensor) -> Tensor:
        """`half.float()`, which may wait."""
        return self._waiting(half) if _may_be_logits(half) and self._may_wait(half) else half.float()

    def _may_wait(self, half: Tensor) -> bool:
        """Whether what may be logits may be a vocabulary's."""
        return (
            half.shape[-1] > WIDEST
            and self._are_logits.get(half.shape[-1], True)
            and type(half._base) is not torch.nn.Parameter
            and half.is_contiguous()
        )

    def _waiting(self, half: Tensor) -> Tensor:
        return upcast(half, partial(self._learn, half.shape[-1]))

    def _learn(self, classes: int, are_logits: bool) -> None:
        if are_logits:
            self._are_logits[classes] = True
        else:
            self._are_logits.setdefault(classes, False)


def large(tensor: Tensor) -> bool:
    """Whether a copy of this tensor is worth a detour."""
    return tensor.numel() >= SMALLEST


def _may_be_logits(half: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and large(half)
        and half.requires_grad
        and torch.is_grad_enabled()
        and type(half) in KINDS
        and torch._C._functorch.maybe_current_level() is None
    )


COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""FP32 copies that were made at once: what each is of, and the versions that both had."""


def original(tensor: Tensor) -> Tensor:
    """What an FP32 copy that was made at once is of, in the same shape; of any other tensor, itself."""
    if tensor.dtype != torch.float32:
        return tensor
    copy = tensor if tensor._base is None else tensor._base
    half, *versions = COPIES.get(copy, (None,))
    if half is None or versions != [half._version, copy._version] or half.numel() != tensor.numel():
        return tensor
    return half.view(tensor.shape) if half.is_contiguous() and tensor.is_contiguous() else tensor


def before_call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
    """Make the FP32 copies that wait for half values which `func` is about to change: what it writes is no more theirs.

    Args:
        func: of torch's, as a `TorchFunctionMode` is told of it, with its arguments.
    """
    if WAITING and (_writes(func) or "out" in kwargs or kwargs.get("inplace")):
        written = {
            value.untyped_storage()._cdata
            for value in tree_leaves((args, kwargs))
            if type(value) in KINDS and torch._C._has_storage(value)
        }
        for source in list(WAITING):
            if source.half.untyped_storage()._cdata in written:
                source.in_fp32()


@cache
def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function of torch's changes its first argument, as its name says: `add_`, `__iadd__`, `__setitem__`.

    Operators registered with torch, `torch.ops`, have a schema that says so.
    """
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    name = getattr(func, "__name__", "")
    operator = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
    return operator or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _version(tensor: Tensor) -> int:
    """How often it was written to in place, which a tensor of inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def half_values(tensor: Tensor) -> Tensor | None:
    """The half values that a tensor has, or stands for: no copy of them. None where there are none."""
    if isinstance(tensor, Upcast):
        return tensor.half_values
    return tensor if tensor.dtype in HALF_DTYPES else None


def _note_writes(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Note what a function of torch's changes, or lends memory of: views that are plain tensors may be written to."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        shared = argument.alias_info is not None and (argument.alias_info.is_write or func.is_view)
        if shared or func.namespace == "c10d":  # which does not say what it writes
            for value in tree_leaves(given.get(argument.name)):
                if isinstance(value, Upcast):
                    value._source.written = True
