"""What MemoryRecorder finds on real training loops, on CPU."""

import itertools

import pytest
import torch
from torch import nn

from lightning_mpt.profiler import Category, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.ledger import replay
from lightning_mpt.profiler.recording import Recording

from .loops import LOOPS, blocks, gpt2, mlp, record


@pytest.mark.parametrize("name", LOOPS)
def test_categories_sum_to_the_peak_and_have_names(name: str) -> None:
    loop = LOOPS[name]()
    report = record(loop)
    assert sum(report.categories.values()) == report.peak_bytes
    assert set(report.phases) == {"forward", "backward", "optimizer_step"}
    for phase in report.phases.values():
        assert sum(phase.categories.values()) == phase.peak_bytes
    assert max(phase.peak_bytes for phase in report.phases.values()) == report.peak_bytes
    assert report.steps == 2
    # The states of the random generators that a checkpoint keeps (5056 bytes each) have no owner.
    states = 4 * 5056 if "checkpointed" in name else 0
    assert report.categories[Category.UNATTRIBUTED] - states <= 0.01 * report.peak_bytes


@pytest.mark.parametrize("name", LOOPS)
def test_model_state_has_the_bytes_that_arithmetic_gives(name: str) -> None:
    loop = LOOPS[name]()
    report = record(loop)
    parameters = sum(parameter.numel() for parameter in loop.module.parameters())
    steps = 4 * len(list(loop.module.parameters()))  # AdamW's step counts: a float each
    assert report.parameters == parameters
    assert report.categories[Category.WEIGHTS] == 4 * parameters
    assert report.categories[Category.OPTIMIZER_STATE] == 8 * parameters + steps
    assert report.phases["optimizer_step"].categories[Category.GRADIENTS] == 4 * parameters
    assert report.categories[Category.BUFFERS] == sum(b.nbytes for b in loop.module.buffers())


def test_the_peak_is_the_allocators_own() -> None:
    """Against another road to the same figure: the running total that torch.profiler gives with every event."""
    loop = gpt2()
    for i in range(2):
        loop.step(i)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        loop.step(2)
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    totals, sizes = [], []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag.name == "Allocation":
            totals.append(node.extra_fields.total_allocated)
            sizes.append((node.start_time_ns, node.extra_fields.alloc_size))
    before = totals[min(range(len(sizes)), key=sizes.__getitem__)] - min(sizes)[1]
    born_while_recording = max(totals) - before

    loop = gpt2()
    report = record(loop, warmup_steps=2, steps=1)
    state = sum(report.categories[c] for c in (Category.WEIGHTS, Category.OPTIMIZER_STATE, Category.BUFFERS))
    # All that is older than the step is owned state, since the gradients were zeroed, but for a scalar or two.
    assert 0 <= report.peak_bytes - (born_while_recording + state) <= 16


def test_saved_activations_are_those_of_an_independent_count() -> None:
    """At the end of forward, what autograd saved is what a saved-tensor hook of the test's own counts."""
    loop = gpt2()
    for i in range(2):
        loop.step(i)
    owned = {p.untyped_storage().data_ptr() for p in (*loop.module.parameters(), *loop.module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and storage.nbytes() != 4 * 128 * 8:  # not a parameter, nor the tokens
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loop.step(2)
    expected = sum(storage.nbytes() for storage in saved.values())

    report = record(gpt2(), warmup_steps=2, steps=1)
    found = max(at.categories[Category.ACTIVATIONS] for at in report.timeline)
    assert found == pytest.approx(expected, rel=0.01)  # each counted as it was packed: some lived on in views only


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_what_a_checkpoint_computes_again_is_activations(reentrant: bool) -> None:
    whole, checkpointed = record(blocks(None)), record(blocks(reentrant))
    before = checkpointed.phases["forward"].categories[Category.ACTIVATIONS]
    again = max(p.categories[Category.ACTIVATIONS] for p in checkpointed.timeline if p.phase == "backward")
    one_block = 256 * 512 * 4
    assert again >= before + one_block
    assert again < whole.phases["forward"].categories[Category.ACTIVATIONS]
    modules = {t.module for t in checkpointed.tensors if t.category is Category.ACTIVATIONS}
    assert {"blocks.0.0", "blocks.0.1"} <= modules  # the last to be computed again, when all gradients are there


def test_modules_own_what_they_make() -> None:
    report = record(mlp())
    parameters = {"0": 64 * 256 + 256, "3": 256 * 10 + 10}
    for path, count in parameters.items():
        assert report.modules[path][Category.WEIGHTS] == 4 * count
    for category in (Category.WEIGHTS, Category.OPTIMIZER_STATE, Category.ACTIVATIONS):
        assert sum(own.get(category, 0) for own in report.modules.values()) == report.categories[category]
    assert report.modules["1"][Category.ACTIVATIONS] == 128 * 256 * 4  # ReLU saves what it gives


def test_the_batch_is_inputs() -> None:
    report = record(mlp())
    assert report.phases["forward"].categories[Category.INPUTS] == 128 * 64 * 4 + 128 * 8


def test_what_is_viewed_of_the_batch_is_inputs_also_where_it_requires_grad() -> None:
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer) as recorder:
        loop.module(torch.randn(8, 8, 512, requires_grad=True).view(512, 64)).sum().backward()
        recorder.step()
    assert recorder.report.phases["forward"].categories[Category.INPUTS] == 512 * 64 * 4


def test_the_gradient_of_a_batch_is_a_gradient() -> None:
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer) as recorder:
        loop.module(torch.randn(4096, 64, requires_grad=True)).sum().backward()
        recorder.step()
    report = recorder.report
    gradients = max(at.categories[Category.GRADIENTS] for at in report.timeline)
    assert 4096 * 64 * 4 <= gradients <= 4096 * 64 * 4 + 4 * report.parameters
    assert report.phases["backward"].categories[Category.INPUTS] == 4096 * 64 * 4
    assert max(at.categories[Category.UNATTRIBUTED] for at in report.timeline) <= 64


def test_what_the_loop_keeps_is_named_by_nobody() -> None:
    """Logits held in a variable through backward are no activation: the report shows them, with their module."""
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
        for _ in range(3):
            x = torch.randn(4096, 64)
            kept = loop.module(x)
            kept.sigmoid().sum().backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            recorder.step()
    kept_bytes = 4096 * 10 * 4
    held = [t for t in recorder.report.tensors if t.category is Category.UNATTRIBUTED and t.bytes == kept_bytes]
    assert held
    assert all(tensor.module == "3" for tensor in held)


def test_gradients_that_stay_are_followed_across_steps() -> None:
    """Accumulation over micro-batches: one set of gradients, also where it is older than the recording."""
    loop = mlp()

    def step() -> None:
        for _ in range(2):
            nn.functional.cross_entropy(loop.module(torch.randn(8, 64)), torch.randint(0, 10, (8,))).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()

    step()
    loop.module(torch.randn(8, 64)).sum().backward()  # leaves gradients behind
    for warmup_steps in (0, 1):
        loop.module(torch.randn(8, 64)).sum().backward()
        with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=warmup_steps) as recorder:
            for _ in range(warmup_steps + 1):
                step()
                recorder.step()
        parameters = recorder.report.parameters
        assert recorder.report.phases["optimizer_step"].categories[Category.GRADIENTS] == 4 * parameters
        assert recorder.report.phases["backward"].categories[Category.GRADIENTS] <= 4 * parameters


def test_an_optimizer_says_what_its_tensors_are() -> None:
    class Master(torch.optim.SGD):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, lr=0.1)
            self.masters = [p.detach().float().clone() for g in self.param_groups for p in g["params"]]

        def memory_categories(self):
            parameters = [p for g in self.param_groups for p in g["params"]]
            yield from zip(itertools.repeat("master_weights"), self.masters, parameters, strict=False)

    class Plugin:
        scale = torch.ones(256)

        def memory_categories(self):
            yield "optimizer_state", self.scale, None

    loop = mlp()
    loop.module.bfloat16()
    loop.optimizer = Master(loop.module.parameters())
    with MemoryRecorder(loop.module, loop.optimizer, witnesses=[Plugin()]) as recorder:
        loop.module(torch.randn(8, 64, dtype=torch.bfloat16)).float().sum().backward()
        loop.optimizer.step()
        recorder.step()
    report = recorder.report
    at_step = report.phases["optimizer_step"].categories
    assert at_step[Category.WEIGHTS] == at_step[Category.GRADIENTS] == 2 * report.parameters
    assert at_step[Category.MASTER_WEIGHTS] == 4 * report.parameters
    assert at_step[Category.OPTIMIZER_STATE] == 1024
    assert report.modules["0"][Category.MASTER_WEIGHTS] == 4 * (64 * 256 + 256)


def test_a_gradient_used_up_inside_backward_is_a_gradient(tmp_path) -> None:
    loop = mlp()
    loop.optimizer = torch.optim.SGD(loop.module.parameters(), lr=0.1)

    def release(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in loop.module.parameters():
        parameter.register_post_accumulate_grad_hook(release)
    with MemoryRecorder(loop.module, loop.optimizer, save_trace=tmp_path / "trace.json") as recorder:
        loop.module(torch.randn(8, 64)).sum().backward()
        recorder.step()
    ledger = replay(Recording.load(tmp_path / "trace.json"))
    gradients = [block.bytes for block in ledger.blocks if block.category is Category.GRADIENTS]
    assert sorted(gradients) == sorted(parameter.nbytes for parameter in loop.module.parameters())


@pytest.mark.parametrize("keep_output", [False, True], ids=["output-dropped", "output-kept"])
def test_unattributed_is_what_the_loop_keeps(keep_output: bool) -> None:
    """Logits returned beside the loss have no owner while a variable keeps them; dropped, they are temporary."""
    loop = gpt2()
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
        for _ in range(3):
            tokens = torch.randint(0, 256, (4, 128))
            output = loop.module(input_ids=tokens, labels=tokens, use_cache=False)
            loss = output.loss
            if not keep_output:
                del output
            loss.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            recorder.step()
    report = recorder.report
    logits = 4 * 128 * 256 * 4
    unattributed = report.categories[Category.UNATTRIBUTED]
    assert unattributed == pytest.approx(logits if keep_output else 0, abs=0.001 * report.peak_bytes)


def test_a_trace_replays_to_the_same_report(tmp_path) -> None:
    loop = gpt2()
    report = record(loop, save_trace=tmp_path / "deep" / "trace.json")
    assert MemoryReport.from_trace(tmp_path / "deep" / "trace.json") == report
