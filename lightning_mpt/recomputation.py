"""What activation checkpointing runs again in backward runs as it ran forward.

The autograd engine calls back with no `TorchFunctionMode` on, so a checkpointed function would be run again without
what was FP32 the first time: with other values, or none where half has no kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint as checkpointing


@contextmanager
def recomputed_within(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within it, a function that `torch.utils.checkpoint` is given is run again within a `context` of its own.

    `checkpoint` looks up by name what does the work, of either kind; meanwhile these names mean what hands on a wrapped
    function.
    """
    plain, reentrant = checkpointing._checkpoint_without_reentrant_generator, checkpointing.CheckpointFunction

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(partial(run, function), *args)

    def without_reentrant(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(partial(run, function), *args, **kwargs)

    before = {"_checkpoint_without_reentrant_generator": plain, "CheckpointFunction": reentrant}
    vars(checkpointing).update(_checkpoint_without_reentrant_generator=without_reentrant, CheckpointFunction=Reentrant)
    try:
        yield
    finally:
        vars(checkpointing).update(before)
