"""DistributedDataParallel's gradient buckets, which no Python object holds.

Its reducer, in C++, copies gradients into flat buckets and sums these over the processes. With
`gradient_as_bucket_view=True` the gradients are views of the buckets, and are found as any gradient is. By default the
buckets are memory of their own, as much as all gradients, kept between steps: their sizes are in what DDP tells its
logger (torch/csrc/distributed/c10d/logger.cpp), their addresses nowhere.
"""

import torch

NOTE = (
    "DistributedDataParallel keeps a second copy of the gradients in its buckets, counted as gradients: "
    "DDPStrategy(gradient_as_bucket_view=True) does without it."
)


def bucket_bytes(root: torch.nn.Module) -> list[int]:
    """The sizes of the buckets, as they are now, that modules in `root` keep beside the gradients."""
    if not torch.distributed.is_available():
        return []
    sizes: list[int] = []
    for module in root.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel) and not module.gradient_as_bucket_view:
            told = module._get_ddp_logging_data()
            # After the first backward pass they are made anew, in the order in which gradients came.
            listed = told.get("rebuilt_bucket_sizes") or told.get("bucket_sizes") or ""
            sizes += [int(size) for size in str(listed).split(",") if size.strip()]
    return sizes
