"""MasterAdamW with no Lightning at all."""

import gc
import weakref
from typing import Any

import pytest
import torch
from stepping import HALVES, STORAGES, assert_same, parameters, set_gradients, snapshot, train
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_mpt import PRESETS, MasterAdamW
from lightning_mpt.masters import MasterWeights
from lightning_mpt.profiler import MemoryRecorder


def test_over_fp32_parameters_it_is_torchs_adamw() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}
    train(MasterAdamW(ours, **options), ours, range(30))
    train(torch.optim.AdamW(theirs, **options), theirs, range(30))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)  # worst seen 4e-7: torch's fused step and its loop


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_groups_keep_their_own_settings(dtype: torch.dtype, storage: str) -> None:
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "lr": 1e-2, "weight_decay": 0.0}, {"params": params[2:], "betas": (0.5, 0.6)}]

    ours = parameters(dtype)
    theirs = [nn.Parameter(parameter.detach().float()) for parameter in ours]
    optimizer, reference = MasterAdamW(groups(ours), master_weights=storage), torch.optim.AdamW(groups(theirs))
    for step in range(20):
        set_gradients(ours, step)
        for mine, parameter in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            parameter.grad = mine.grad.float()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(optimizer.master_params(), [p.detach() for p in theirs], rtol=2e-6, atol=1e-7)
    assert {frozenset(state) for state in optimizer.state.values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}
    assert set(optimizer.param_groups[0]) == set(reference.param_groups[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_updates_below_the_resolution_of_half_add_up_in_the_master(dtype: torch.dtype) -> None:
    """1000 steps of 1e-6 move a weight of 1 by 1e-3; each alone is lost in half precision."""
    ends = []
    for kind in (MasterAdamW, torch.optim.AdamW):
        weight = nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer = kind([weight], lr=1e-6, weight_decay=0.0)
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends.append((weight.detach().float(), optimizer))
    (ours, optimizer), (theirs, _) = ends
    torch.testing.assert_close(optimizer.master_params()[0], torch.full((8,), 0.999), rtol=0, atol=3e-5)  # type: ignore[attr-defined]
    assert torch.equal(ours, torch.full((8,), 0.999).to(dtype).float())
    assert torch.equal(theirs, torch.ones(8))


@pytest.mark.parametrize(("preset", "expected"), [("exact", 14), ("compact", 7.1)])
def test_bytes_per_parameter_are_those_of_the_table(preset: str, expected: float) -> None:
    """Weight, gradient, master and moments of a large parameter; FP32 AdamW has 16."""
    parameter = nn.Parameter(torch.zeros(1000, 1000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = MasterAdamW([parameter], **PRESETS[preset])
    optimizer.step()
    masters = [tensor for _, tensor, _ in optimizer.memory_categories()]
    held = [parameter, parameter.grad, *masters, *optimizer.state[parameter].values()]
    assert sum(tensor.nbytes for tensor in held) / parameter.numel() == pytest.approx(expected, rel=0.01)


def test_the_triton_kernel_serves_cpu_tensors_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts its writes: whoever keeps a decoded master sees that the weight is another."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU the kernels are compiled for it, and tested there in test_cuda.py")
    from lightning_mpt.kernels.triton import TritonKernel

    def run() -> MasterAdamW:
        params = parameters(torch.bfloat16)
        optimizer = MasterAdamW(params, lr=1e-2)
        versions = [parameter._version for parameter in params]
        train(optimizer, params, range(5))
        assert all(parameter._version > version for parameter, version in zip(params, versions, strict=True))
        return optimizer

    plain = run()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ours = run()
    assert isinstance(ours._kernel(torch.device("cpu")), TritonKernel)
    torch.testing.assert_close(ours.master_params(), plain.master_params(), rtol=1e-6, atol=1e-8)


def test_masters_given_are_where_it_starts() -> None:
    fp32 = [torch.randn_like(parameter, dtype=torch.float32) for parameter in parameters(torch.float32)]
    params = [nn.Parameter(torch.zeros_like(value, dtype=torch.bfloat16)) for value in fp32]
    optimizer = MasterAdamW(params, masters=fp32)
    assert_same(optimizer.master_params(), fp32)
    torch.testing.assert_close([p.detach() for p in params], [value.bfloat16() for value in fp32], rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("masters", "message"),
    [
        (lambda m: m[:2], r"masters has 2 tensors for 4 parameters: give one for each"),
        (lambda m: [m[0].t(), *m[1:]], r"masters\[0\] is torch.float32 of shape \(23, 17\) for a parameter of shape"),
        (lambda m: [m[0], m[1].double(), *m[2:]], r"masters\[1\] is torch.float64"),
        (lambda m: [*m[:3], m[3] * float("nan")], r"masters\[3\] holds inf or NaN"),
    ],
    ids=["count", "shape", "dtype", "nan"],
)
def test_masters_that_do_not_fit_are_refused(masters: Any, message: str) -> None:
    params = parameters(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        MasterAdamW(params, masters=masters([parameter.detach().float() for parameter in params]))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_written_from_outside_is_where_its_master_goes_on(storage: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, lr=1e-3, master_weights=storage)
    train(optimizer, params, range(3))
    with torch.no_grad():
        params[0].copy_(torch.full_like(params[0], 0.3))
    assert torch.equal(optimizer.master_params()[0], torch.full_like(params[0], 0.3).float())
    train(optimizer, params, range(3, 4))
    assert not torch.equal(optimizer.master_params()[0], params[0].float())  # and has bits of its own again


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradscaler_drives_it_and_a_step_that_overflows_changes_nothing(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = MasterAdamW(params, lr=1e-2)
    reference = parameters(dtype)
    plain = MasterAdamW(reference, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for step in range(6):
        loss = sum((parameter.float() * (step + 1)).square().sum() for parameter in params)
        scaler.scale(loss).backward()  # type: ignore[arg-type]
        if step == 3:
            assert params[0].grad is not None
            params[0].grad.view(-1)[7] = float("inf")
            before = snapshot(optimizer, params)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 3:
            assert_same(snapshot(optimizer, params), before)
            assert scaler.get_scale() == 2.0**5
        else:
            sum((p.float() * (step + 1)).square().sum() for p in reference).backward()  # type: ignore[union-attr]
            plain.step()
            plain.zero_grad()
    for ours, theirs in zip(optimizer.master_params(), plain.master_params(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # worst seen 3e-4: small unscaled fp16 gradients


def test_closures_schedules_and_tensors_as_learning_rate() -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, lr=torch.tensor(1e-2))
    schedule = CosineAnnealingLR(optimizer, T_max=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(parameter.float().square().sum() for parameter in params)
        loss.backward()  # type: ignore[union-attr]
        return loss  # type: ignore[return-value]

    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.0, abs=1e-8)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params)
    set_gradients(params, 0)
    params[2].grad = None
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before)
    assert params[2] not in optimizer.state


def test_groups_may_be_added_later() -> None:
    params, late = parameters(torch.bfloat16), parameters(torch.bfloat16, seed=1)
    optimizer = MasterAdamW(params)
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": late, "lr": 1e-4})
    train(optimizer, params + late, range(2, 4))
    assert [int(optimizer.state[p]["step"]) for p in (params[0], late[0])] == [4, 2]
    assert len(optimizer.master_params()) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be a finite number of at least 0"),
        ({"lr": float("nan")}, "lr=nan must be"),
        ({"lr": "fast"}, "lr='fast' must be"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers of at least 0 and below 1"),
        ({"betas": (float("nan"), 0.9)}, r"betas=\(nan, 0.9\) must be"),
        ({"betas": 0.9}, "betas=0.9 must be"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas=.* must be two"),
        ({"eps": -1e-8}, "eps=-1e-08 must be"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be"),
        ({"master_weights": "half"}, "master_weights='half' is not a way"),
        ({"optimizer_state": "none"}, "optimizer_state='none' is not a way"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MasterAdamW(parameters(torch.bfloat16), **arguments)
    if set(arguments) <= {"lr", "betas", "eps", "weight_decay"}:
        optimizer = MasterAdamW(parameters(torch.bfloat16))
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": parameters(torch.bfloat16), **arguments})
        assert len(optimizer.param_groups) == 1


def test_float64_and_sparse_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.float64 cannot be trained with FP32 masters: make it torch.float32"):
        MasterAdamW([nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = MasterAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"torch.sparse_coo.*use sparse=False"):
        optimizer.step()


def test_moments_and_masters_follow_a_change_of_memory_format() -> None:
    weights = [
        nn.Parameter(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16()) for _ in range(2)
    ]
    optimizers = [MasterAdamW([weight], lr=1e-2) for weight in weights]
    for step in range(4):
        if step == 2:
            weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            set_gradients([weight], step)
            optimizer.step()
    assert_same(optimizers[1].master_params(), optimizers[0].master_params())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_adds_little_memory_however_large_one_embedding_is(storage: str) -> None:
    embedding = nn.Embedding(50_000, 64, dtype=torch.bfloat16)
    optimizer = MasterAdamW(embedding.parameters(), master_weights=storage)
    recorder = MemoryRecorder(embedding, [optimizer])
    with recorder:
        for _ in range(3):
            embedding(torch.arange(100)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    phase = recorder.report.phases["optimizer_step"]
    state_bytes = embedding.weight.numel() * {"split": 14, "float32": 16}[storage]
    assert phase.peak_bytes < 1.05 * state_bytes
    assert phase.categories["master_weights"] == embedding.weight.numel() * {"split": 2, "float32": 4}[storage]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_an_adopted_optimizer_is_the_same_object_with_all_it_had(kind: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = kind([{"params": params[:2], "lr": 1e-3}, {"params": params[2:], "lr": 1e-2}], weight_decay=0.1)
    schedule = CosineAnnealingLR(optimizer, T_max=100)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    groups = optimizer.param_groups
    adopted = MasterAdamW.adopt(optimizer, MasterWeights(), "split")
    assert adopted is optimizer
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups is groups
    set_gradients(params, 0)
    optimizer.step()
    schedule.step()  # no warning that the optimizer has not stepped
    assert calls == ["pre", "post"]
    assert "master" not in optimizer.state_dict()["state"][0]
    adopted.release()
    assert type(optimizer) is kind
    assert not {"masters", "storage", "masters_in_module"} & set(vars(optimizer))
    set_gradients(params, 1)
    for parameter in params:
        parameter.data = parameter.data.float()
        assert parameter.grad is not None
        parameter.grad = None
    optimizer.step()


def test_adam_keeps_its_weight_decay_in_the_gradient() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    adopted = torch.optim.Adam(ours, lr=1e-2, weight_decay=0.5)
    MasterAdamW.adopt(adopted, MasterWeights(), "split")
    train(adopted, ours, range(10))
    train(torch.optim.Adam(theirs, lr=1e-2, weight_decay=0.5), theirs, range(10))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_state_that_was_replaced_is_let_go_of() -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    before = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    gc.collect()
    assert before() is None


@pytest.mark.parametrize("storage", ["float32", "split", "split8"])
def test_a_half_parameter_with_gaps_and_another_order_in_memory_is_trained_as_any(storage: str) -> None:
    values = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    strided = nn.Parameter(values[:, :, 0].t())
    plain = nn.Parameter(strided.detach().clone(memory_format=torch.contiguous_format))
    assert strided.stride() != plain.stride()
    optimizers = [MasterAdamW([parameter], lr=0.01, master_weights=storage) for parameter in (strided, plain)]
    for step in range(3):
        for parameter, optimizer in zip((strided, plain), optimizers, strict=True):
            parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()
    assert torch.equal(strided, plain)
    assert torch.equal(optimizers[0].master_params()[0], optimizers[1].master_params()[0])
