"""Training on many devices where each has a whole copy of the model: `torch.nn.parallel.DistributedDataParallel`.

The ranks stay alike bit for bit. They start from the masters of the first, they reduce half gradients, so that each
sees the same ones, an inf or NaN of any rank among them, and the update is the same arithmetic everywhere.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .conversion import PLAIN
from .masters import MasterWeights


@torch.no_grad()
def share_masters(replicas: DistributedDataParallel, parameters: Iterable[Tensor], masters: MasterWeights) -> None:
    """Give every rank the masters of the first one, as torch has done with the half weights: changes both in place.

    Args:
        replicas: the wrapped module; every rank must call this.
        parameters: the half parameters of the module, in one order on all ranks.
        masters: theirs.
    """
    ignored = {
        parameter for name, parameter in replicas.module.named_parameters() if name in replicas.parameters_to_ignore
    }
    for parameter in parameters:
        if parameter not in ignored:
            value = masters.read(parameter).to(parameter.device, copy=True)
            torch.distributed.broadcast(value, group=replicas.process_group, group_src=0)
            masters.write(parameter, value, PLAIN)  # stale where the half weights differed, and without a storage
