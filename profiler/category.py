"""What a byte is for: the names under which every report counts memory."""

from enum import Enum


class Category(str, Enum):
    """The use of a block of memory. The values are the keys of saved reports."""

    WEIGHTS = "weights"
    """Parameters, in the precision in which forward and backward read them."""
    MASTER_WEIGHTS = "master_weights"
    """FP32 masters, or what completes a half weight to its FP32 master."""
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    """Moments, step counts, and scratch that an optimizer keeps between steps."""
    ACTIVATIONS = "activations"
    """Saved for backward, whether by the forward pass or by a checkpoint's second one."""
    BUFFERS = "buffers"
    INPUTS = "inputs"
    """The batch."""
    TEMPORARIES = "temporaries"
    """Born and gone within one phase, and the workspaces of libraries."""
    ROUNDING = "rounding"
    """The allocator's blocks less what was asked for. Nothing on CPU."""
    UNATTRIBUTED = "unattributed"
    """What could not be named. Never spread over the others."""

    def __str__(self) -> str:
        return self.value


PRIORITY: dict[Category, int] = {
    category: rank
    for rank, category in enumerate(
        (
            Category.WEIGHTS,
            Category.MASTER_WEIGHTS,
            Category.OPTIMIZER_STATE,
            Category.GRADIENTS,
            Category.BUFFERS,
            Category.INPUTS,
            Category.ACTIVATIONS,
            Category.TEMPORARIES,
            Category.ROUNDING,
            Category.UNATTRIBUTED,
        )
    )
}
"""One storage has one owner. Where several claim it (a saved tensor that is a parameter, a gradient kept in an
optimizer's flat buffer), the one that comes first here has it."""

MODEL_STATE = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
"""What grows with the number of parameters, so that bytes per parameter say something."""
