"""Half-precision training with FP32 master weights for PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from .loss_scale import ConstantLossScale, DynamicLossScale
from .optimizer import MasterAdamW
from .presets import PRESETS

if TYPE_CHECKING:
    from .fabric import FabricMasterWeightPrecision
    from .gradient_histogram import GradientHistogram
    from .precision import MasterWeightPrecision

__all__ = [
    "PRESETS",
    "ConstantLossScale",
    "DynamicLossScale",
    "FabricMasterWeightPrecision",
    "GradientHistogram",
    "MasterAdamW",
    "MasterWeightPrecision",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import: the optimizer, the profiler and the command line do without it.
    if name == "MasterWeightPrecision":
        from .precision import MasterWeightPrecision

        return MasterWeightPrecision
    if name == "FabricMasterWeightPrecision":
        from .fabric import FabricMasterWeightPrecision

        return FabricMasterWeightPrecision
    if name == "GradientHistogram":
        from .gradient_histogram import GradientHistogram

        return GradientHistogram
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
