"""FP32 tensors that meet half ones: a product is half, what is written takes the type of what it is written into."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.fp32_functions import FP32Functions
from tests.training import Classifier, classification, fit

HALVES = (torch.float16, torch.bfloat16)
Function = Callable[[Tensor, Tensor], Tensor]

PRODUCTS: dict[str, Function] = {
    "linear": F.linear,
    "matmul": torch.matmul,
    "operator": lambda a, b: a @ b,
    "mm": lambda a, b: a.mm(b),
    "bmm": lambda a, b: torch.bmm(a[None], b[None]),
    "addmm": lambda a, b: torch.addmm(a, b, b),
    "vecdot": torch.linalg.vecdot,
    "cross": lambda a, b: torch.linalg.cross(a[:, :3], b[:, :3]),
    "multi_dot": lambda a, b: torch.linalg.multi_dot([a, b, a]),
    "dot": lambda a, b: torch.dot(a[0], b[0]),
    "tensordot": lambda a, b: torch.tensordot(a, b, dims=2),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "einsum of a list": lambda a, b: torch.einsum("ij,kj->ik", [a, b]),
    "bilinear": lambda a, b: F.bilinear(a, a, b[None]),
    "conv1d": lambda a, b: F.conv1d(a[None], b[:, :, None]),
    "conv2d": lambda a, b: F.conv2d(a[None, None], weight=b[None, None]),
    "conv_transpose1d": lambda a, b: F.conv_transpose1d(a[None], b[:, :, None]),
    "layer_norm": lambda a, b: F.layer_norm(a, (4,), b[0], b[1]),
    "rms_norm": lambda a, b: F.rms_norm(a, (4,), b[0]),
    "group_norm": lambda a, b: F.group_norm(a, 2, b[0], b[1]),
    "prelu": lambda a, b: F.prelu(a, b[0]),
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None, None], b[None, None], b[None, None]),
    "attention by name": lambda a, b: F.scaled_dot_product_attention(a[None], value=b[None], key=b[None]),
}
WRITES: dict[str, Function] = {
    "index_add": lambda a, b: a.index_add(0, ROWS, b),
    "index_add_": lambda a, b: a.clone().index_add_(0, ROWS, b),
    "index_copy": lambda a, b: torch.index_copy(a, 0, ROWS, b),
    "scatter": lambda a, b: a.scatter(0, ROWS[:, None].expand(4, 4), b),
    "scatter_add": lambda a, b: a.scatter_add(0, ROWS[:, None].expand(4, 4), b),
    "scatter_reduce": lambda a, b: a.scatter_reduce(0, ROWS[:, None].expand(4, 4), b, "amax"),
    "masked_scatter": lambda a, b: a.masked_scatter(a > 0, b),
    "put_": lambda a, b: a.clone().put_(ROWS, b[0]),
    "addmm_": lambda a, b: a.clone().addmm_(b, b),
    "index_reduce": lambda a, b: a.index_reduce(0, ROWS, b, "amax"),
    "lerp": lambda a, b: a.lerp(b, b[0, 0]),
    "setitem": lambda a, b: written(a.clone(), b),
}
ROWS = torch.tensor([1, 0, 3, 2])


def written(a: Tensor, b: Tensor) -> Tensor:
    a[ROWS] = b
    return a


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Exact in half, so that it does not matter which is rounded."""
    a, b = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    return a, b


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_both_is_the_half_one(name: str, dtype: torch.dtype) -> None:
    product, (a, b) = PRODUCTS[name], operands(dtype)
    expected = product(a, b)
    for mixed in ((a.float(), b), (a, b.float())):
        with FP32Functions():
            found = product(*mixed)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        gradients = torch.autograd.grad(found.float().sum(), (a, b))
        assert {gradient.dtype for gradient in gradients} == {dtype}
    with FP32Functions():
        assert product(a.float(), b.float()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:index_reduce.* is in beta")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_takes_the_type_of_what_it_is_written_into(name: str, dtype: torch.dtype) -> None:
    write, (a, b) = WRITES[name], operands(dtype)
    with torch.no_grad():
        expected = write(a, b)
        with FP32Functions():
            assert torch.equal(write(a, b.float()), expected)
            assert torch.equal(write(a.float(), b), write(a.float(), b.float()))
    assert expected.dtype == dtype


def test_a_tensor_that_the_result_is_to_be_in_keeps_its_type() -> None:
    a, b = operands(torch.bfloat16)
    with torch.no_grad(), FP32Functions():
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(a, b, out=torch.zeros(4, 4))
        out = torch.zeros(4, 4)
        assert torch.equal(torch.mm(a.float(), b.float(), out=out), out)
        assert out.any()


def test_masks_of_attention_stay_as_they_are() -> None:
    a, b = operands(torch.float16)
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)
    with FP32Functions():
        found = F.scaled_dot_product_attention(a.float()[None, None], b[None, None], b[None, None], mask)
    expected = F.scaled_dot_product_attention(*(x.float()[None, None] for x in (a, b, b)), mask)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    heads = nn.MultiheadAttention(4, 2).half()
    with FP32Functions():
        assert heads(a.float(), b, b.float(), attn_mask=mask)[0].dtype == torch.float16


def test_numpy_is_given_what_it_knows() -> None:
    a, _ = operands(torch.bfloat16)
    with FP32Functions(), torch.no_grad():
        assert a.detach().numpy().dtype == np.float32
        assert np.asarray(a.detach()).dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):  # it is a copy
            a.detach().numpy()[0] = 1
        assert a.detach().half().numpy().dtype == np.float16


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_loss_that_goes_on_into_a_layer_trains_as_in_fp32(precision: Any) -> None:
    class Matching(Classifier):
        """As sets are matched: costs of all pairs by losses without reduction, an assignment by numpy."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            scores = self(batch[0])
            costs = F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores), reduction="none")
            pairs = costs @ F.one_hot(batch[1], 4).to(batch[0].dtype).T
            best = torch.from_numpy(pairs.detach().cpu().numpy().argmin(0))
            loss = F.cross_entropy(scores[best] + self.offset, batch[1])
            self.losses.append(loss.item())
            return loss

    found = {}
    for plugin in (None, MasterWeightPrecision(precision)):
        torch.manual_seed(0)
        module = Matching(nn.Linear(16, 4))
        module.offset = torch.ones(4)  # no buffer
        fit(module, classification(5), plugin)
        found[plugin] = module.losses
    (fp32, ours) = found.values()
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(fp32), rtol=0.05, atol=0.05)
