"""What a training step would need, told without a device: the real loops on tensors that have no memory."""

from .trial import EstimateError, Trial

__all__ = ["EstimateError", "Trial"]
