"""Optimizers as users have them: they hold parameters in ways of their own, and know nothing of half precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class KeepsAList(Optimizer):
    """Steps the parameters of a list that it made itself, as torch's LBFGS does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self._params = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for p in self._params:
            if p.grad is not None:
                p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        return loss


class KeepsADictionary(Optimizer):
    """Has its momentum in a dictionary by parameter, and the parameters in pairs."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self._momentum = {p: 0.0 * p.detach().float() for group in self.param_groups for p in group["params"]}
        self._pairs = {"all": [(index, p) for index, p in enumerate(self._momentum)]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for _, p in self._pairs["all"]:
            if p.grad is not None:
                self._momentum[p] = self._momentum[p] * 0.9 + p.grad
                p.sub_(self._momentum[p], alpha=self.param_groups[0]["lr"])


class OldStyle(Optimizer):
    """Gives its parameters new tensors, as code from before `torch.no_grad` does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad.data


class Decays(Optimizer):
    """Shrinks every weight, with a gradient or without."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)


class Lookahead(Optimizer):
    """Arxiv 1907.08610, as usually written: an optimizer inside, which has the same groups."""

    def __init__(self, params: Any, k: int = 3) -> None:
        self.optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        super().__init__(self.optimizer.param_groups, {"k": k})
        self.param_groups = self.optimizer.param_groups
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.data.clone())
                if self._steps % group["k"] == 0:
                    slow.add_(p.data - slow, alpha=0.5)
                    p.data.copy_(slow)
        return loss


class SAM(Optimizer):
    """Arxiv 2010.01412, as in github.com/davda54/sam."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = self._grad_norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)).to(p))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()

    def _grad_norm(self) -> Tensor:
        norms = [p.grad.norm(p=2) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return torch.norm(torch.stack(norms), p=2)


class SGDScheduleFree(Optimizer):
    """Arxiv 2405.15682, as in github.com/facebookresearch/schedule_free, shortened."""

    def __init__(self, params: Any, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "train_mode": True, "weight_sum": 0.0})

    def eval(self) -> None:
        self._move(train_mode=False)

    def train(self) -> None:
        self._move(train_mode=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Not in theirs: a context, as optimizers with averages of their own have."""
        self.eval()
        try:
            yield
        finally:
            self.train()

    @torch.no_grad()
    def _move(self, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                weight = 1 - group["momentum"] if train_mode else 1 - 1 / group["momentum"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(end=self.state[p]["z"], weight=weight)
                group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["weight_sum"] += 1
            c = 1 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(end=z, weight=c)
                    p.add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - c) - 1))
                    z.sub_(p.grad, alpha=group["lr"])
        return loss
