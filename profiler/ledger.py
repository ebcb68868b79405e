"""The ledger: allocation events to what is live, whose it is, and the peak. Pure: no torch, no clock, no device.

A block is (address, bytes, born, freed). Replaying the events in order from a known start gives the blocks; a claim
(an owner seen at an address, at a time) gives its category to the block alive there and then, for the block's whole
life: a gradient seen after it was accumulated was a gradient from birth. A second sweep adds up the categories after
every event and keeps the highest moment of every phase. Time and memory are linear in the number of events, but for
sorting them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter

from .category import PRIORITY, Category
from .recording import Claim, Event, Interval, Mark, Recording, Window

FORWARD = "forward"
BACKWARD = "backward"
CLIP = "clip"
"""Between backward and the optimizer's step, where gradients are clipped."""
OPTIMIZER_STEP = "optimizer_step"
PHASES = (FORWARD, BACKWARD, CLIP, OPTIMIZER_STEP)
"""In the order of a step."""
OUTSIDE = ""
"""The phase between steps: what happens there is followed, but belongs to no step and to no peak."""

_NEVER = 1 << 63
_OLDER_ONLY = -1
"""Stands in `requested_bytes` of a free that is meant for a block older than the recording, and for no younger one."""


@dataclass(slots=True, eq=False)
class Block:
    """A block of memory from birth to free."""

    address: int
    bytes: int
    requested_bytes: int
    born: int
    """Index of the event that it was born with; -1 for what is older than the recording."""
    born_ns: int
    born_phase: int
    """Index into the phase marks; -1 before the first."""
    freed: int = _NEVER
    freed_ns: int = _NEVER
    freed_phase: int | None = None
    claim: Claim | None = None
    category: Category = Category.UNATTRIBUTED
    module: str | None = None


@dataclass
class Peak:
    """The highest moment of a stretch of time, and what it was made of."""

    bytes: int = 0
    categories: dict[Category, int] = field(default_factory=dict)
    event: int = -1
    """Index of the event after which it was reached; -1 before any. Blocks with born <= event < freed were alive."""


@dataclass
class Moment:
    """What was live at `time_ns`, in phase `phase`, and until the next one."""

    time_ns: int
    phase: str
    categories: dict[Category, int]


@dataclass
class Ledger:
    """A replayed recording."""

    blocks: list[Block]
    peak: Peak
    phases: dict[str, Peak]
    timeline: list[Moment]
    phase_names: list[str] = field(default_factory=list)
    """Of the phase marks, in order of time."""

    def phase_of_birth(self, block: Block) -> str | None:
        """The phase in which the block was born; None for what is older than the recording."""
        return self.phase_names[block.born_phase] if block.born >= 0 and block.born_phase >= 0 else None

    def live_at_peak(self) -> Iterator[Block]:
        """The blocks that made up the peak."""
        at = self.peak.event
        return (block for block in self.blocks if block.born <= at < block.freed)


def replay(recording: Recording, timeline_points: int = 400) -> Ledger:
    """Replay a recording: every block with its category, the peak within the counted steps, and each phase's own.

    Args:
        recording: what was seen. Events need not be sorted; of equal times the given order holds.
        timeline_points: into how many stretches of equal length the counted time is cut; of each, the highest moment
            is kept, so the peak is always among them, and, where nothing happens in the next, the last one too.

    Where the recording ended because memory ran out, the peak is what was live then, which ends the timeline; and the
    phase that ran ends there: what was born in it and has no owner is a temporary, as far as can be known.
    """
    older_frees = [Event(gone.time_ns, gone.address, 0, _OLDER_ONLY) for gone in recording.gone]
    events = sorted([*recording.events, *older_frees], key=itemgetter(0))
    phases = sorted(recording.phases, key=itemgetter(0))
    failed_ns = recording.failed_ns
    if failed_ns is not None:  # after it, memory was only freed, on the exception's way out
        events = [event for event in events if event.time_ns <= failed_ns]
        phases = [mark for mark in phases if mark.time_ns <= failed_ns]
    blocks = _blocks(recording.start, events, phases)
    for own in recording.own:
        blocks = [block for block in blocks if not _within(block, own, recording.clock_error_ns)]
    if failed_ns is not None:
        for block in blocks:
            if block.freed == _NEVER:
                block.freed_phase = len(phases) - 1
    _assign(recording, blocks, events, phases)
    ledger = _sweep(recording.windows, events, phases, blocks, timeline_points)
    if failed_ns is not None:
        ledger.peak = _at_the_end(blocks, len(events))
        if phases:
            ledger.timeline.append(Moment(failed_ns, phases[-1].name or OUTSIDE, dict(ledger.peak.categories)))
    ledger.phase_names = [mark.name or OUTSIDE for mark in phases]
    return ledger


def _blocks(start: list[Event], events: list[Event], phases: list[Mark]) -> list[Block]:
    """Every block that lived. An allocation at a live address ends the older block: its free went unseen."""
    blocks = [Block(event.address, event.bytes, event.requested_bytes, -1, event.time_ns, -1) for event in start]
    live = {block.address: block for block in blocks}
    phase = 0
    for index, (time_ns, address, size, requested) in enumerate(events):
        while phase < len(phases) and phases[phase].time_ns <= time_ns:
            phase += 1
        before = live.get(address)
        if before is not None and (requested != _OLDER_ONLY or before.born < 0):
            before.freed, before.freed_ns, before.freed_phase = index, time_ns, phase - 1
            del live[address]
        if size > 0:
            live[address] = block = Block(address, size, requested, index, time_ns, phase - 1)
            blocks.append(block)
    return blocks


def _within(block: Block, own: Interval, error_ns: int) -> bool:
    """Whether the block was born and freed while the profiler itself worked."""
    return own.start_ns - error_ns <= block.born_ns and block.freed_ns <= own.end_ns + error_ns


def _assign(recording: Recording, blocks: list[Block], events: list[Event], phases: list[Mark]) -> None:
    """Give every block its category and its module."""
    lives: dict[int, list[Block]] = {}
    for block in blocks:
        lives.setdefault(block.address, []).append(block)

    for claim in sorted(recording.claims, key=itemgetter(0)):
        owned = _alive(lives.get(claim.address, []), claim.time_ns, recording.clock_error_ns)
        if owned is None:
            if not recording.claims_make_blocks:
                continue
            owned = _older_block(recording, claim, lives, events)
            blocks.append(owned)
        if owned.claim is None or PRIORITY[claim.category] < PRIORITY[owned.claim.category]:
            owned.claim = claim

    modules = sorted(recording.modules, key=itemgetter(0))
    module_times = [mark.time_ns for mark in modules]
    began = _forward_began(phases, modules)
    for block in blocks:
        at = bisect_right(module_times, block.born_ns) - 1 if block.born >= 0 else -1
        running = modules[at].name if at >= 0 else None
        if block.claim is not None:
            block.category = block.claim.category
            block.module = block.claim.module
            if block.category is Category.ACTIVATIONS:
                block.module = running if running is not None else block.claim.module
                # What was there before the first module ran and is saved for backward is what went in, unless autograd
                # saw it made: a step may compute with bare parameters before it calls a module.
                saved_phase = bisect_right(phases, block.claim.time_ns, key=itemgetter(0)) - 1
                before = block.born < 0 or (saved_phase >= 0 and block.born_ns < began[saved_phase])
                if before and not block.claim.computed:
                    block.category = Category.INPUTS
        else:
            block.module = running
            workspace = block.freed == _NEVER and block.requested_bytes in recording.workspace_bytes
            if workspace or _within_a_phase(block, phases):
                block.category = Category.TEMPORARIES
    _assign_buckets(recording, blocks)


def _assign_buckets(recording: Recording, blocks: list[Block]) -> None:
    """Each bucket is the oldest block of its size that has no owner and is not freed; or, where the source does not
    tell of blocks older than the recording, one of these."""
    kept = [block for block in blocks if block.claim is None and block.freed == _NEVER]
    for size in recording.bucket_bytes:
        bucket = next((block for block in kept if block.requested_bytes == size), None)
        if bucket is not None:
            kept.remove(bucket)
        elif recording.claims_make_blocks:
            bucket = Block(0, size, size, -1, recording.phases[0].time_ns if recording.phases else 0, -1)
            blocks.append(bucket)
        else:
            continue
        bucket.category, bucket.module = Category.GRADIENTS, None


def _within_a_phase(block: Block, phases: list[Mark]) -> bool:
    if block.born < 0 or block.freed_phase is None:
        return False
    since_ns = phases[block.freed_phase].since_ns if block.freed_phase >= 0 else None
    late = since_ns is not None and block.born_ns >= since_ns
    if block.freed_phase == block.born_phase or (late and block.freed_phase == block.born_phase + 1):
        return True
    # What is between backward and the next forward pass is the step on the gradients: clipping is a part of it.
    passed = range(block.born_phase, block.freed_phase + 1)
    return block.born_phase >= 0 and all(phases[index].name in (CLIP, OPTIMIZER_STEP) for index in passed)


def _alive(blocks: list[Block], time_ns: int, error_ns: int) -> Block | None:
    """The block alive at `time_ns`, of those that lived at one address in turn."""
    at = bisect_right(blocks, time_ns, key=lambda block: block.born_ns if block.born >= 0 else -_NEVER) - 1
    if at >= 0 and blocks[at].freed_ns > time_ns:
        return blocks[at]
    if at + 1 < len(blocks) and blocks[at + 1].born_ns <= time_ns + error_ns:
        return blocks[at + 1]
    if at >= 0 and blocks[at].freed_ns > time_ns - error_ns:
        return blocks[at]
    return None


def _older_block(recording: Recording, claim: Claim, lives: dict[int, list[Block]], events: list[Event]) -> Block:
    """A block that no event tells of, since its allocation came before the recording or by another way.

    Where the address was never seen before, it is as old as the recording; else it cannot be older than this claim.
    """
    others = lives.setdefault(claim.address, [])
    at = bisect_right(others, claim.time_ns, key=lambda block: block.born_ns)
    born, born_ns = -1, recording.phases[0].time_ns if recording.phases else claim.time_ns
    if at > 0:
        born = bisect_left(events, claim.time_ns, key=itemgetter(0))
        born_ns = claim.time_ns
    block = Block(claim.address, claim.bytes, claim.bytes, born, min(born_ns, claim.time_ns), -1)
    if at < len(others):
        block.freed, block.freed_ns = others[at].born, others[at].born_ns
    for gone in recording.gone:
        if gone.address == claim.address and claim.time_ns <= gone.time_ns < block.freed_ns:
            block.freed_ns = gone.time_ns
            block.freed = bisect_left(events, gone.time_ns, key=itemgetter(0))
            break
    others.insert(at, block)
    return block


def _forward_began(phases: list[Mark], modules: list[Mark]) -> list[int]:
    """For every phase mark, when the first module ran in it (0: none did). After backward it is the forward before."""
    module_times = [mark.time_ns for mark in modules if mark.name is not None]
    began: list[int] = []
    for index, mark in enumerate(phases):
        at = bisect_right(module_times, mark.time_ns - 1)
        end = phases[index + 1].time_ns if index + 1 < len(phases) else _NEVER
        ran = mark.name == FORWARD and at < len(module_times) and module_times[at] < end
        goes_on = index > 1 and mark.name == FORWARD and phases[index - 1].name == BACKWARD
        began.append((goes_on and began[index - 2]) or (module_times[at] if ran else 0))
    return began


class _Sweep:
    """Running totals by category, and the highest moments seen."""

    def __init__(self, start_ns: int, span_ns: int, points: int) -> None:
        self.totals = dict.fromkeys(Category, 0)
        self.total = 0
        self.phase = OUTSIDE
        self.peak = Peak()
        self.phases: dict[str, Peak] = {}
        self._highest: dict[int, tuple[int, Moment]] = {}
        self._last: list[Moment] = []
        self._seen_ns = self._stretch = 0
        self._start_ns, self._span_ns, self._points = start_ns, max(span_ns, 1), points

    def add(self, block: Block, sign: int) -> None:
        self.total += sign * block.bytes
        self.totals[block.category] += sign * block.requested_bytes
        self.totals[Category.ROUNDING] += sign * (block.bytes - block.requested_bytes)

    def go_on(self, time_ns: int) -> None:
        """Up to `time_ns` stays what was last observed: for longer than a stretch, and it is a moment of its own."""
        if self._stretch_of(time_ns) > self._stretch + 1 and self.total != self._highest[self._stretch][0]:
            self._last.append(Moment(self._seen_ns, self.phase, dict(self.totals)))

    def observe(self, event: int, time_ns: int) -> None:
        """Take what is live after `event` into account."""
        for peak in (self.peak, self.phases.setdefault(self.phase, Peak())):
            if self.total > peak.bytes:
                peak.bytes, peak.event, peak.categories = self.total, event, dict(self.totals)
        self._seen_ns, self._stretch = time_ns, self._stretch_of(time_ns)
        highest = self._highest.get(self._stretch)
        if highest is None or self.total > highest[0]:
            self._highest[self._stretch] = (self.total, Moment(time_ns, self.phase, dict(self.totals)))

    def _stretch_of(self, time_ns: int) -> int:
        return (time_ns - self._start_ns) * self._points // self._span_ns

    def timeline(self) -> list[Moment]:
        """The moments that are kept, in order of time."""
        return sorted([moment for _, moment in self._highest.values()] + self._last, key=attrgetter("time_ns"))


def _at_the_end(blocks: list[Block], events: int) -> Peak:
    totals = _Sweep(0, 0, 1)
    for block in blocks:
        if block.freed == _NEVER:
            totals.add(block, 1)
    return Peak(totals.total, totals.totals, events)


def _sweep(windows: list[Window], events: list[Event], phases: list[Mark], blocks: list[Block], points: int) -> Ledger:
    """Walk through the events once more, now that every block has its category."""
    births = sorted(blocks, key=lambda block: block.born)
    deaths = sorted((block for block in blocks if block.freed != _NEVER), key=lambda block: block.freed)
    turns: list[tuple[int, int, str]] = [(mark.time_ns, 0, mark.name or OUTSIDE) for mark in phases]
    for window in windows:
        turns += [(window.start_ns, 1, ""), (window.end_ns, -1, "")]
    turns.sort(key=lambda turn: (turn[0], turn[1] != -1))  # a step ends before the phase after it begins
    start_ns = min((window.start_ns for window in windows), default=0)
    end_ns = max((window.end_ns for window in windows), default=0)

    sweep = _Sweep(start_ns, end_ns - start_ns, points)
    counted = False
    born = died = turn = 0
    for index in range(-1, len(events) + 1):
        time_ns = events[index][0] if 0 <= index < len(events) else (_NEVER if index >= 0 else -_NEVER)
        while turn < len(turns) and turns[turn][0] <= time_ns:
            at_ns, step, name = turns[turn]
            turn += 1
            if counted and sweep.phase != OUTSIDE:
                sweep.go_on(at_ns)
            if step:
                counted = step > 0
            else:
                sweep.phase = name
            if counted and sweep.phase != OUTSIDE:
                sweep.observe(index - 1, at_ns)
        if counted and sweep.phase != OUTSIDE and index < len(events):
            sweep.go_on(time_ns)
        while died < len(deaths) and deaths[died].freed <= index:
            sweep.add(deaths[died], -1)
            died += 1
        while born < len(births) and births[born].born <= index:
            sweep.add(births[born], 1)
            born += 1
        if counted and sweep.phase != OUTSIDE and index < len(events):
            sweep.observe(index, time_ns)
    order = {name: rank for rank, name in enumerate(PHASES)}
    by_phase = dict(sorted(sweep.phases.items(), key=lambda item: order.get(item[0], len(order))))
    return Ledger(blocks, sweep.peak, by_phase, sweep.timeline())
