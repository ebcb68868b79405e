"""Memory that grows from step to step, until there is none left: a loss that is added up with its graph, say.

A step should end with what it began with. What does not is known by two signs together: more is live at the end of
every counted step than at the end of the one before; and of what every one of them made for itself (activations,
inputs, what has no owner) something is still there after the last. A queue that is full, or a batch that is let go of
when the next one comes, gives one of them at most.
"""

from bisect import bisect_left

from .category import Category
from .figures import Growth
from .ledger import Block
from .recording import Window

LEAST_STEPS = 3
"""Two can differ for many reasons."""
LEAST_BYTES = 1024
"""Scalars that a loop keeps are no danger."""
LEAST_SHARE = 1e-4
"""Of what is live: at this rate it is twice as much after ten thousand steps."""
_OF_ONE_STEP = (Category.ACTIVATIONS, Category.INPUTS, Category.TEMPORARIES, Category.UNATTRIBUTED)


def growth_of(blocks: list[Block], windows: list[Window]) -> Growth | None:
    """By how much memory grows in a step, and what it is; None where it does not, or where that cannot be known.

    Args:
        blocks: with their categories.
        windows: the counted steps, in order of time.
    """
    if len(windows) < LEAST_STEPS:
        return None
    ends = [window.end_ns for window in windows]
    changes = [0] * len(ends)  # from one step's end to the next
    left = [0] * len(ends)  # by the step that made it
    categories: dict[Category, int] = {}
    modules: dict[str, int] = {}
    for block in blocks:
        born, freed = bisect_left(ends, block.born_ns), bisect_left(ends, block.freed_ns)
        if born == freed:  # within a step, or after the last
            continue
        changes[born] += block.bytes
        if freed < len(ends):
            changes[freed] -= block.bytes
        elif block.category in _OF_ONE_STEP and windows[0].start_ns <= block.born_ns <= ends[-2]:
            left[born] += block.bytes
            categories[block.category] = categories.get(block.category, 0) + block.bytes
            if block.module is not None:
                modules[block.module] = modules.get(block.module, 0) + block.bytes
    live_bytes = sum(changes)
    step_bytes = min(*changes[1:], *left[:-1])
    if step_bytes < max(LEAST_BYTES, LEAST_SHARE * live_bytes):
        return None
    return Growth(step_bytes, categories, modules)
