"""The plugin for Lightning Fabric, where the loop is the user's. What the Trainer's does too is in `pipeline.py`.

convert_module   the module becomes half; Fabric's strategy learns to hand over optimizers and clipping
setup_optimizer  the optimizer steps FP32 masters
backward         the loss is scaled
optimizer_step   unscale, clip and update, or skip
restore          modules and optimizers are FP32 again

Fabric shows a precision plugin an optimizer when it steps for the first time. That is too late: by then a checkpoint
may have been loaded, and torch would have cast the moments to the parameters' half. And it clips gradients where they
lie, in half and scaled, or else as FP32 copies of all. So Fabric's strategy gets a part in front, until `restore`.
Where it shards the module (`ModelParallelStrategy`), masters are taken from the shards: the module is converted once it
is sharded, and not before.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from lightning.fabric.plugins.precision import Precision
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from .base import MasterOptimizer, unwrapped
from .bridge import refuse_unfit
from .loss_scale import ConstantLossScale, DynamicLossScale
from .pipeline import Clip, MasterWeightPipeline


class FabricMasterWeightPrecision(MasterWeightPipeline, Precision):
    """`MasterWeightPrecision` for Lightning Fabric, whose loop is the user's.

    ```python
    plugin = FabricMasterWeightPrecision("16-true")
    fabric = Fabric(plugins=[plugin])
    model, optimizer = fabric.setup(model, optimizer)
    for inputs, targets in loader:
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(model(inputs), targets))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer, "precision": plugin})  # FP32, and the loss scale
    plugin.restore()
    ```

    From `setup` on the module is half, takes half and gives FP32: a loss computed from what it gives is FP32, and so is
    one within its `forward`. Of logits for cross entropy there is no FP32 copy, here or there. `state_dict` is FP32 at
    any time, of the module and of the optimizer. Fabric has no end of training: `restore` makes the module itself FP32.

    A step with a gradient that is not finite changes nothing: `skipped_steps` counts it, `clip_gradients` gives the
    norm that it saw and raises nothing, and a schedule that was handed to `hold` waits.

    Args:
        precision, loss_scale, master_weights, optimizer_state, fp32_modules, autocast: as in `MasterWeightPrecision`.
            There is no `gradient_release`: Fabric does not say which backward is the last before a step.

    Raises:
        ValueError: an argument is not one of these; the message names it.
    """

    def __init__(
        self,
        precision: Literal["16-true", "bf16-true"] = "16-true",
        *,
        loss_scale: float | str | DynamicLossScale | ConstantLossScale | None = "auto",
        master_weights: str = "split",
        optimizer_state: str = "float32",
        fp32_modules: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__(precision, loss_scale, master_weights, optimizer_state, fp32_modules, autocast)
        self._strategies: list[tuple[Strategy, type[Strategy]]] = []
        """Those that have a part in front, and their own classes."""

    # -- what a user may ask ------------------------------------------------------------------------------------

    def hold(self, scheduler: Any, frequency: int = 1) -> None:
        """From now on a learning-rate schedule does not advance for steps that were skipped.

        Args:
            scheduler: of an optimizer that Fabric has set up. Its class changes, until `restore`.
            frequency: how many steps the loop takes for each call of the schedule.
        """
        self._schedules.hold(scheduler, frequency)

    def restore(self) -> None:
        """Make modules and optimizers FP32 again: those that the user gave, with the values of the masters.

        The loop may go on, in FP32, and what is set up anew is half again. `teardown` of a strategy does the same.
        """
        for strategy, own in self._strategies:
            strategy.__class__ = own
        self._strategies = []
        self._let_go()

    @override
    def teardown(self) -> None:
        self.restore()

    # -- setting up ---------------------------------------------------------------------------------------------

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        strategies = _strategies_with(self)
        if not any(isinstance(strategy, ModelParallelStrategy) for strategy in strategies):
            self.take(module)
        for strategy in strategies:
            if not isinstance(strategy, _MasterWeightStrategy):
                own = type(strategy)
                self._strategies.append((strategy, own))
                strategy.__class__ = type(own.__name__, (_MasterWeightStrategy, own), {})
                self._train_on(strategy.root_device)
        return module

    def take(self, module: nn.Module) -> None:
        """Make the module half. Fabric's strategy calls this where it shards the module, once it has."""
        self._convert(module)
        self._watch_over(module)

    def adopt(self, optimizer: Optimizer) -> None:
        """Make an optimizer step FP32 masters; Fabric's strategy calls this. Once more changes nothing.

        Raises:
            ValueError, TypeError: it is not one that can; the message says why.
        """
        if not isinstance(optimizer, MasterOptimizer):
            refuse_unfit(optimizer)
            self._adopt(optimizer)

    # -- the loop -----------------------------------------------------------------------------------------------

    @override
    def convert_input(self, data: Any) -> Any:
        return super().convert_input(data) if self._converted else data

    @override
    def convert_output(self, data: Any) -> Any:
        """Half tensors become FP32, for what is computed from them outside of the module.

        Of logits for cross entropy no FP32 copy is made (`upcast.py`).
        """
        return apply_to_collection(data, Tensor, lambda t: self._casts.to_fp32(t) if t.dtype == self._dtype else t)

    @override
    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return super().forward_context() if self._converted else nullcontext()

    @override
    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        # Checkpointed modules run forward again here.
        with self._half_numerics() if self._converted else nullcontext():
            super().backward(self._scaled(tensor) if self._converted else tensor, model, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if not self._converted:
            return super().optimizer_step(optimizer, **({} if closure is None else {"closure": closure}), **kwargs)
        self.adopt(optimizer)  # set up before its module
        result = None
        if closure is not None:
            result = closure()
            kwargs["closure"] = lambda: result
        self._update(optimizer, self._clips.pop(optimizer, None), **kwargs)
        return result

    def clip(self, optimizer: Optimizer, limit: float, *, by_norm: bool) -> Tensor | None:
        """Note how the gradients are to be clipped; the update does it, on true gradients, in the same pass.

        Returns:
            The true gradients' norm where that is asked for: float32, no dimensions, on the device.
        """
        optimizer = unwrapped(optimizer)
        self.adopt(optimizer)
        scan = optimizer.scan_gradients(norm=by_norm)  # type: ignore[attr-defined]
        self._clips[optimizer] = Clip(float(limit), by_norm, scan)
        return scan.norm / self._gradients_scale if by_norm else None


class _MasterWeightStrategy(Strategy):
    """The part in front of Fabric's own strategy class, while its precision is a `FabricMasterWeightPrecision`."""

    _precision: FabricMasterWeightPrecision

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        made = super().setup_module(module)
        if isinstance(self, ModelParallelStrategy):
            self._precision.take(made)
        self._precision._join(made)
        return made

    @override
    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = dict(state) if isinstance(state, dict) else {}
        rest = super().load_checkpoint(path, state, *args, **kwargs)
        for converted in self._precision._converted:
            # What a file holds is by the user's names; that of a module alone is its state_dict.
            names = [name for name, value in given.items() if value is converted.module]
            self._precision._reload(converted, path, names[0] if names else None)
        for name, value in given.items():
            if value is self._precision and state[name] is not value:  # a sharded file's entry is put in its place
                value.load_state_dict(state[name])
                state[name] = value
        return rest

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self._precision.adopt(optimizer)
        return super().setup_optimizer(optimizer)

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """The norm before clipping. If it is not finite the step will be skipped, and nothing is raised."""
        if float(norm_type) != 2.0:
            raise ValueError(
                f"norm_type={norm_type!r} cannot be: gradients are clipped within the update, by the Euclidean norm of "
                "all. Leave it out, or clip by value: clip_val=..."
            )
        norm = self._precision.clip(optimizer, max_norm, by_norm=True)
        assert norm is not None
        return norm

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        self._precision.clip(optimizer, clip_val, by_norm=False)


def _strategies_with(plugin: Precision) -> list[Strategy]:
    """The strategies whose precision the plugin is. They know it, and nothing tells it of them."""
    found = (one for one in gc.get_objects() if Strategy in type(one).__mro__)
    return [strategy for strategy in found if strategy._precision is plugin]
