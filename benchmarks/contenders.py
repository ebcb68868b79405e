"""The optimizer steps that are timed against each other: ours, torch's with all that it needs, flashoptim's.

Each is built over fresh parameters with gradients of ordinary magnitudes, and is a call without arguments: one step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_mpt import MasterAdamW

Shapes = Sequence[tuple[int, ...]]
Step = Callable[[], object]

UNDER_AUTOCAST = "torch fused, fp32, GradScaler, recast"
"""What training under `16-mixed` does where training under master weights does one step."""


def parameters(shapes: Shapes, dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Parameters with gradients, of ordinary magnitudes."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        parameter = torch.nn.Parameter((0.02 * torch.randn(shape, device=device, generator=generator)).to(dtype))
        parameter.grad = (1e-3 * torch.randn(shape, device=device, generator=generator)).to(dtype)
        made.append(parameter)
    return made


def total(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def torch_adamw(shapes: Shapes, device: str, **options: Any) -> torch.optim.AdamW:
    """FP32 parameters under torch's AdamW."""
    return torch.optim.AdamW(parameters(shapes, torch.float32, device), lr=1e-3, **options)


def autocast_step(shapes: Shapes, device: str) -> Step:
    """Fused FP32 AdamW driven by a GradScaler, and the half copies that autocast makes of its weights after a step."""
    fp32 = parameters(shapes, torch.float32, device)
    step = scaled_step(torch.optim.AdamW(fp32, lr=1e-3, fused=True), device)
    halves = [torch.empty_like(parameter, dtype=torch.float16) for parameter in fp32]

    def call() -> None:
        step()
        torch._foreach_copy_(halves, [parameter.detach() for parameter in fp32])

    return call


def scaled_step(optimizer: torch.optim.Optimizer, device: str) -> Step:
    """A step as `torch.amp.GradScaler` drives it: look for inf and NaN, then unscale within the update.

    The scale is set to 1 again after each step, so that it does not drift between rounds.
    """
    scaler = torch.amp.GradScaler(device, init_scale=1.0)
    scaler.scale(torch.ones((), device=device))

    def call() -> None:
        scaler.step(optimizer)
        scaler.update(1.0)

    return call


def scanned_step(optimizer: MasterAdamW, device: str) -> Step:
    """A step as the plugin drives it: one look at the gradients, then unscale, clip by the norm and update in one."""
    scale = torch.full((), 1.0, device=device)

    def call() -> None:
        found_inf, norm = optimizer.scan_gradients(norm=True)
        assert norm is not None
        optimizer.grad_scale = scale * (norm / scale).clamp(min=1.0)
        optimizer.found_inf, optimizer.clip_value = found_inf, None
        optimizer.step()

    return call


def flash_step(shapes: Shapes, device: str) -> Step:
    """FlashOptim's AdamW in the formats of our `compact`; ImportError where it is not installed."""
    from flashoptim import FlashAdamW

    half = parameters(shapes, torch.bfloat16, device)
    step: Step = FlashAdamW(half, lr=1e-3, quantize=True, master_weight_bits=24).step
    return step
