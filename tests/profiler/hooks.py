"""What a recording switches on: the tests ask whether it is off again."""

import torch
from torch import nn

_DISABLE = torch.autograd.graph.disable_saved_tensors_hooks


def hooks_on(module: nn.Module) -> list[object]:
    """Every hook that is on the module, its parameters, or autograd."""
    on = [torch._C._autograd._top_saved_tensors_default_hooks(False)]
    for child in module.modules():
        on += [*child._forward_hooks.values(), *child._forward_pre_hooks.values(), *child._forward_hooks_with_kwargs]
        on += [*child._forward_hooks_always_called, *child._backward_hooks.values()]
    for parameter in module.parameters():
        on += [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]
    if torch.autograd.graph.disable_saved_tensors_hooks is not _DISABLE:
        on.append(torch.autograd.graph.disable_saved_tensors_hooks)
    return [hook for hook in on if hook is not None]


def assert_all_is_off(module: nn.Module) -> None:
    assert hooks_on(module) == []
    assert not torch._C._autograd._profiler_enabled()
