"""Reports made by hand, for the tests of how they look and what they advise."""

import dataclasses
from typing import Any

from lightning_mpt.profiler import (
    AllocatorHealth,
    Category,
    Duplicate,
    MemoryReport,
    ModuleForward,
    PhasePeak,
    TensorUse,
    TimelinePoint,
)

MIB = 1 << 20
W, M, G, S, A, T = (
    Category.WEIGHTS,
    Category.MASTER_WEIGHTS,
    Category.GRADIENTS,
    Category.OPTIMIZER_STATE,
    Category.ACTIVATIONS,
    Category.TEMPORARIES,
)


def transformer(
    blocks: int = 12, *, weight_bytes: int = 4, activations: int = 40 * MIB, **changes: Any
) -> MemoryReport:
    """A transformer as AdamW trains it, with one MiB of weights at 4 bytes, and `activations` in every block.

    A block's activations are its own residual, 1/10, and those of `attn`, 3/10, and `mlp`, 6/10.
    """
    parameters = blocks * 2 * MIB // 8
    weights, state = weight_bytes * parameters, 8 * parameters
    masters = 2 * parameters if weight_bytes == 2 else 0
    modules: dict[str, dict[Category, int]] = {"": {Category.INPUTS: MIB}}
    forwards = {"net": ModuleForward(3, 1000 * blocks + 2000, 4)}
    dtypes = {}
    half_block = {W: weights // blocks // 2, M: masters // blocks // 2, S: state // blocks // 2}
    for i in range(blocks):
        path = f"net.h.{i}"
        modules[path] = {A: activations // 10}
        modules[f"{path}.attn"] = {A: 3 * activations // 10, **half_block}
        modules[f"{path}.mlp"] = {A: 6 * activations // 10, **half_block}
        dtypes[f"{path}.attn"] = {"float32" if weight_bytes == 4 else "bfloat16": 3 * activations // 10}
        forwards[path] = ModuleForward(3, 1000, activations // 10)
        forwards[f"{path}.attn"] = ModuleForward(3, 800, activations // 10)
        forwards[f"{path}.mlp"] = ModuleForward(3, 200, activations // 10)
    always = {W: weights, M: masters, S: state, Category.INPUTS: MIB}
    saved = sum(own.get(A, 0) for own in modules.values())
    forward = {**always, A: saved, T: MIB}
    backward = {**always, A: saved, G: weights // 10, T: 4 * MIB}
    step = {**always, G: weights, T: MIB}
    phases = {
        name: PhasePeak(sum(categories.values()), categories)
        for name, categories in (("forward", forward), ("backward", backward), ("optimizer_step", step))
    }
    highest = max(phases.values(), key=lambda phase: phase.peak_bytes)
    report = MemoryReport(
        device="cuda:0",
        peak_bytes=highest.peak_bytes,
        reserved_bytes=2 * highest.peak_bytes,
        categories=dict.fromkeys(Category, 0) | dict(highest.categories),
        phases=phases,
        modules=modules,
        tensors=tuple(
            TensorUse(MIB * (20 - i), A, f"net.h.{i % blocks}.mlp", (8, 256, 512), "bfloat16", "forward")
            for i in range(15)
        ),
        duplicates=(Duplicate("net.h.0.attn", (8, 256, 128), ("bfloat16", "float32"), MIB),),
        timeline=tuple(
            TimelinePoint(1_000_000 * i, name, phase.peak_bytes, phase.categories)
            for i, (name, phase) in enumerate(phases.items())
        ),
        parameters=parameters,
        steps=3,
        forwards=forwards,
        activation_dtypes=dtypes,
        optimizers=("AdamW",),
        health=AllocatorHealth(2 * highest.peak_bytes, 30 * MIB, 32 * MIB, 500 * MIB, 80 << 30, 1),
        notes=("Two modules could not be told apart.",),
    )
    return dataclasses.replace(report, **changes)
