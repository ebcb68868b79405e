"""Half-precision training with FP32 master weights for PyTorch Lightning."""

from .fabric import FabricMasterWeightPrecision
from .gradient_histogram import GradientHistogram
from .loss_scale import ConstantLossScale, DynamicLossScale
from .optimizer import MasterAdamW
from .precision import MasterWeightPrecision
from .presets import PRESETS

__all__ = [
    "PRESETS",
    "ConstantLossScale",
    "DynamicLossScale",
    "FabricMasterWeightPrecision",
    "GradientHistogram",
    "MasterAdamW",
    "MasterWeightPrecision",
]
