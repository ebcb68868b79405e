"""What changes how forward and backward run: compiled modules, activation checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from training import Classifier, classification, fit, mlp

from lightning_mpt import MasterWeightPrecision

HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


def run(make: Callable[[], Classifier], precision: Any) -> tuple[list[float], dict[str, Tensor]]:
    module = make()
    fit(module, classification(4), MasterWeightPrecision(precision))
    state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    return module.losses, state


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CompiledWithLoss(Classifier):
    """Forward and loss in one compiled function."""

    def __init__(self, backend: str) -> None:
        super().__init__(mlp(width=16))
        self._loss = torch.compile(self._plain_loss, backend=backend)

    def _plain_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(*batch)
        assert loss.dtype == torch.float32
        self.losses.append(loss.item())
        return loss


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("precision", HALVES)
def test_a_compiled_network_trains_as_an_uncompiled_one(precision: Any, backend: str) -> None:
    losses, state = run(lambda: Classifier(mlp(width=16)), precision)
    for make in (
        lambda: Classifier(torch.compile(mlp(width=16), backend=backend)),
        lambda: CompiledWithLoss(backend),
    ):
        compiled_losses, compiled_state = run(make, precision)
        assert compiled_losses == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(compiled_state, state, rtol=0, atol=1e-3)


class WithoutBreaks(Classifier):
    """Nothing in its step makes the compiler give up: the whole is one graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("precision", HALVES)
def test_a_compiled_lightning_module_is_compiled_once_and_fp32_after_fit(precision: Any) -> None:
    """Masters, scales and schedules come and go outside of the graph."""
    module, counter = WithoutBreaks(mlp(width=16)), CompileCounter()
    fit(torch.compile(module, backend=counter), classification(2), MasterWeightPrecision(precision), max_epochs=2)  # type: ignore[arg-type]
    assert counter.frame_count == 1
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    again = Classifier(mlp(width=16))
    fit(again, classification(2), MasterWeightPrecision(precision), max_epochs=2)
    torch.testing.assert_close(module.state_dict(), again.state_dict(), rtol=0, atol=1e-3)


class Checkpointed(nn.Module):
    """A network that forgets its activations, and draws random numbers."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        self.net = mlp(width=16)
        self.dropout = nn.Dropout(0.25)
        self._reentrant = reentrant
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0](x)
        if self._reentrant is None:
            return self._rest(x)
        return checkpoint(self._rest, x, use_reentrant=self._reentrant)

    def _rest(self, x: Tensor) -> Tensor:
        self.dtypes += [x.dtype, torch.zeros(1).dtype]
        return self.net[1:](self.dropout(x))


@pytest.mark.parametrize("manual", [False, True], ids=["", "manual"])
@pytest.mark.parametrize("precision", HALVES)
def test_checkpointed_activations_give_the_same_run_bit_for_bit(precision: Any, manual: bool) -> None:
    class ByHand(Classifier):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if manual:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    runs = []
    for reentrant in (None, False, True):
        torch.manual_seed(1)
        net = Checkpointed(reentrant=reentrant)
        runs.append(run(lambda net=net: ByHand(net), precision))  # type: ignore[misc]
        assert set(net.dtypes) == {HALVES[precision]}
        assert len(net.dtypes) == 2 * 4 * (1 if reentrant is None else 2)
    for losses, state in runs[1:]:
        assert losses == runs[0][0]
        torch.testing.assert_close(state, runs[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("precision", HALVES)
def test_the_module_says_what_type_it_computes_in(precision: Any) -> None:
    class Noisy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            assert self.dtype == HALVES[precision]
            return super().training_step(
                (batch[0] + torch.randn(batch[0].shape, dtype=self.dtype), batch[1]), batch_idx
            )

    module = Noisy(mlp())
    fit(module, classification(1), MasterWeightPrecision(precision))
    assert module.dtype == torch.float32


@pytest.mark.parametrize("precision", HALVES)
def test_what_is_finite_in_a_batch_stays_finite(precision: Any) -> None:
    class Masked(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            x, y, mask = batch
            limit = torch.finfo(HALVES[precision]).max
            assert mask.tolist() == [-limit, min(1e9, limit), -torch.inf, 0.5] or mask[1].item() == 1e9 // 2**22 * 2**22
            assert mask.dtype == HALVES[precision]
            return super().training_step((x, y), batch_idx)

    mask = torch.tensor([torch.finfo(torch.float32).min, 1e9, -torch.inf, 0.5])
    batches = [(x, y, mask) for x, y in classification(1)]
    fit(Masked(mlp()), batches, MasterWeightPrecision(precision))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batches_of_every_layout_become_half(dtype: torch.dtype) -> None:
    plugin = MasterWeightPrecision("16-true" if dtype == torch.float16 else "bf16-true")
    dense = torch.eye(3)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    batch = [dense, dense.to_sparse_coo(), nested, dense[:0], dense.double(), dense.to(dtype), dense.long()]
    halves = plugin.convert_input(batch)
    assert [half.dtype for half in halves] == [dtype] * 6 + [torch.int64]
    assert torch.equal(halves[1].to_dense(), halves[0])
    assert halves[0].data_ptr() != dense.data_ptr()
