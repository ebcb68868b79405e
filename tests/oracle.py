"""AdamW in float64, written from the papers, sharing nothing with what it is held against."""

import math

import torch
from torch import Tensor


class OracleAdamW:
    """One parameter. arXiv 1412.6980 (Adam), 1711.05101 (decoupled weight decay), 1904.09237 (AMSGrad)."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decoupled: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.m, self.v, self.v_max = (torch.zeros_like(self.weight) for _ in range(3))
        self.t = 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.decoupled, self.amsgrad, self.maximize = decoupled, amsgrad, maximize

    def step(
        self, gradient: Tensor, *, scale: float = 1.0, coefficient: float = 1.0, clip_value: float | None = None
    ) -> None:
        g = gradient.double() / scale * coefficient
        if clip_value is not None:
            g = torch.where(g.abs() > clip_value, g.sign() * clip_value, g)
        if self.maximize:
            g = -g
        self.t += 1
        decay = self.weight_decay * self.weight
        if not self.decoupled:
            g = g + decay
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.v_max = torch.maximum(self.v_max, self.v)
        v = self.v_max if self.amsgrad else self.v
        update = (self.m / (1 - beta1**self.t)) / ((v / (1 - beta2**self.t)).sqrt() + self.eps)
        if self.decoupled:
            update = update + decay
        self.weight = self.weight - self.lr * update


def norm(tensors: list[Tensor]) -> float:
    """The Euclidean norm over all elements, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
