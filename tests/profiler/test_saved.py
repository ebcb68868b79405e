"""Saved-tensor hooks in their place: training that refuses such hooks, or has its own, goes on as without recording."""

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_mpt.profiler import Category, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.collect.saved import UNSEEN

from .hooks import assert_all_is_off
from .loops import Loop


def penalty(transform: Any) -> Loop:
    """A physics-informed network of sorts: the loss is of a derivative by the inputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(32, 4, generator=generator)
        return vmap(transform(lambda z: model(z).squeeze()))(x).square().mean() + model(x).square().mean()

    return Loop(module, loss)


def per_sample() -> Loop:
    """Gradients of every sample, by a module that is called with parameters from outside."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(32, 4, generator=generator)

        def of(parameters: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
            return functional_call(model, parameters, (z,)).square().sum()

        gradients = vmap(grad(of), in_dims=(None, 0))(dict(model.named_parameters()), x)
        return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()

    return Loop(module, loss)


LOOPS = {
    "grad": lambda: penalty(grad),
    "vjp": lambda: penalty(lambda f: lambda z: vjp(f, z)[1](torch.tensor(1.0))[0]),
    "jacrev": lambda: penalty(jacrev),
    "hessian": lambda: penalty(hessian),
    "vmap": lambda: penalty(lambda f: f),
    "per sample": per_sample,
}


def train(loop: Loop, steps: int = 3) -> tuple[list[float], MemoryReport]:
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
        losses = []
        for i in range(steps):
            losses.append(loop.step(i))
            recorder.step()
    assert_all_is_off(loop.module)
    return losses, recorder.report


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own call, for forward mode
@pytest.mark.parametrize("name", LOOPS)
def test_functions_transformed_by_torch_func_train_as_without_recording(name: str) -> None:
    plain, recorded = LOOPS[name](), LOOPS[name]()
    losses, report = train(recorded)
    assert losses == [plain.step(i) for i in range(3)]
    for a, b in zip(plain.module.parameters(), recorded.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert (UNSEEN in report.notes) == (name != "vmap")


def test_what_is_saved_after_a_transform_is_seen_again() -> None:
    module = nn.Linear(64, 64)
    derivative = grad(lambda z: z.square())

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        return model(torch.randn(256, 64, generator=generator)).tanh().sum() * derivative(torch.tensor(1.0))

    _, report = train(Loop(module, loss))
    assert report.phases["backward"].categories[Category.ACTIVATIONS] >= 256 * 64 * 4


def test_a_loop_that_disables_saved_tensor_hooks_is_recorded_without_them() -> None:
    loop = LOOPS["vmap"]()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        _, report = train(loop)
    assert UNSEEN in report.notes
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters


def test_hooks_stay_off_where_the_step_ends_while_they_are_disabled() -> None:
    loop = LOOPS["vmap"]()
    disabled = torch.autograd.graph.disable_saved_tensors_hooks
    with MemoryRecorder(loop.module, loop.optimizer, steps=1) as recorder:
        entered = torch.autograd.graph.disable_saved_tensors_hooks("none here")
        assert torch.autograd.graph.disable_saved_tensors_hooks is not disabled
        with entered:
            loop.step(0)
            recorder.step()
            assert torch.autograd.graph.disable_saved_tensors_hooks is disabled
        loop.step(1)
    assert_all_is_off(loop.module)


def test_a_transform_under_the_users_own_hooks_is_refused_as_torch_refuses_it() -> None:
    loop = LOOPS["grad"]()
    with (
        MemoryRecorder(loop.module, loop.optimizer),
        saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"),
    ):
        loop.step(0)
    torch._C._autograd._saved_tensors_hooks_enable()  # torch itself leaves them disabled after that error
    assert_all_is_off(loop.module)


class Selective(nn.Module):
    """Checkpointed, but for the results of its products, which are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
        return checkpoint(self._inner, x, use_reentrant=False, context_fn=contexts)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(nn.functional.gelu(self.wide(x)))


def selective() -> Loop:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), *(Selective() for _ in range(3)))
    return Loop(module, lambda model, g: model(torch.randn(256, 64, generator=g)).square().mean())


def test_what_a_selective_checkpoint_keeps_is_activations() -> None:
    plain, recorded = selective(), selective()
    losses, report = train(recorded)
    assert losses == [plain.step(i) for i in range(3)]
    assert sum(report.categories.values()) == report.peak_bytes
    states = 3 * 5056  # of the random generator, which checkpoints keep
    assert report.categories[Category.UNATTRIBUTED] - states <= 0.01 * report.peak_bytes
    for block in ("1", "2"):
        assert report.modules[f"{block}.wide"][Category.ACTIVATIONS] == 256 * 256 * 4
        assert report.modules[f"{block}.narrow"][Category.ACTIVATIONS] == 256 * 64 * 4
