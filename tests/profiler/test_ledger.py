"""The ledger against a naive oracle, and its rules one by one on histories made by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mpt.profiler import Category
from lightning_mpt.profiler.category import PRIORITY
from lightning_mpt.profiler.ledger import replay
from lightning_mpt.profiler.recording import Claim, Event, Gone, Interval, Mark, Recording, Window

OWNED = [Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.ACTIVATIONS]


def claim(
    time_ns: int, address: int, category: Category, module: str | None = None, size: int = 0, computed: bool = False
) -> Claim:
    return Claim(time_ns, address, size, category, module, (size,), "float32", computed)


def recording(events=(), claims=(), phases=None, windows=None, **rest) -> Recording:
    """A recording of one counted step from 0 to 1000, forward all the way unless told otherwise."""
    return Recording(
        device="cpu",
        parameters=0,
        events=[Event(time_ns, address, size, size) for time_ns, address, size in events],
        claims=list(claims),
        phases=[Mark(0, "forward")] if phases is None else phases,
        windows=[Window(0, 1000, None)] if windows is None else windows,
        **rest,
    )


# -- against the oracle -------------------------------------------------------------------------------------------


@st.composite
def histories(draw) -> Recording:
    """Allocations and frees of few addresses, so that these are used again; every time is its own."""
    clock = iter(range(1, 10_000))
    start = [
        Event(0, address, size, size)
        for address, size in draw(st.dictionaries(st.integers(1, 6), st.integers(1, 50), max_size=4)).items()
    ]
    result = Recording("cpu", 0, start=start)
    result.phases.append(Mark(next(clock), "forward"))
    opened = next(clock)
    kinds = st.sampled_from(["alloc", "alloc", "free", "claim", "claim", "phase", "step", "gone"])
    for kind in draw(st.lists(kinds, max_size=60)):
        time_ns = next(clock)
        address = draw(st.integers(1, 6))
        if kind == "alloc":
            size = draw(st.integers(1, 50))
            result.events.append(Event(time_ns, address, size, draw(st.integers(1, size))))
        elif kind == "free":
            result.events.append(Event(time_ns, address, 0, 0))
        elif kind == "claim":
            result.claims.append(claim(time_ns, address, draw(st.sampled_from(OWNED))))
        elif kind == "gone":
            result.gone.append(Gone(time_ns, address))
        elif kind == "phase":
            result.phases.append(
                Mark(time_ns, draw(st.sampled_from(["forward", "backward", "clip", "optimizer_step", ""])))
            )
        else:
            result.windows.append(Window(opened, time_ns, None))
            opened = time_ns + 1
    result.windows.append(Window(opened, next(clock), None))
    return result


class Oracle:
    """The definitions, computed anew from the whole history at every moment: quadratic, and hard to get wrong."""

    def __init__(self, history: Recording) -> None:
        self.history = history
        self.moments = sorted(
            [(event.time_ns, "event", event) for event in history.events]
            + [(gone.time_ns, "gone", gone) for gone in history.gone]
            + [(mark.time_ns, "mark", mark) for mark in history.phases]
            + [(window.start_ns, "mark", None) for window in history.windows],
            key=lambda moment: moment[0],
        )

    def live(self, time_ns: int) -> dict[int, Event]:
        """address -> the allocation that holds it, after all that happened up to `time_ns`."""
        live = {event.address: event for event in self.history.start}
        for when, kind, what in self.moments:
            if when > time_ns:
                break
            if kind == "event":
                live.pop(what.address, None)
                if what.bytes > 0:
                    live[what.address] = what
            elif kind == "gone" and live.get(what.address) in self.history.start:
                del live[what.address]
        return live

    def phase(self, time_ns: int) -> int:
        return max((i for i, mark in enumerate(self.history.phases) if mark.time_ns <= time_ns), default=-1)

    def counted(self, time_ns: int) -> bool:
        return any(window.start_ns <= time_ns < window.end_ns for window in self.history.windows)

    def category(self, block: Event) -> Category:
        claims = [c for c in self.history.claims if self.live(c.time_ns).get(c.address) is block]
        old = any(block is event for event in self.history.start)
        if claims:
            best = min((c.category for c in claims), key=PRIORITY.__getitem__)
            return Category.INPUTS if best is Category.ACTIVATIONS and old else best
        if not old:
            frees = [when for when, _, _ in self.moments if when > block.time_ns]
            freed = next((when for when in frees if self.live(when).get(block.address) is not block), None)
            if freed is not None:
                lived = range(self.phase(block.time_ns), self.phase(freed) + 1)
                names = {self.history.phases[index].name for index in lived}
                if len(lived) == 1 or names <= {"clip", "optimizer_step"}:
                    return Category.TEMPORARIES
        return Category.UNATTRIBUTED

    def peaks(self) -> dict[str, list[tuple[int, dict[Category, int]]]]:
        """phase -> the bytes and categories at every counted moment in it."""
        found: dict[str, list[tuple[int, dict[Category, int]]]] = {}
        for when, _, _ in self.moments:
            index = self.phase(when)
            name = self.history.phases[index].name if index >= 0 else ""
            if not self.counted(when) or not name:
                continue
            categories = dict.fromkeys(Category, 0)
            for block in self.live(when).values():
                categories[self.category(block)] += block.requested_bytes
                categories[Category.ROUNDING] += block.bytes - block.requested_bytes
            found.setdefault(name, []).append((sum(categories.values()), categories))
        return found


@settings(max_examples=300, deadline=None)
@given(histories())
def test_replay_equals_the_oracle(history: Recording) -> None:
    ledger = replay(history)
    expected = Oracle(history).peaks()
    assert set(ledger.phases) == set(expected)
    for name, peak in ledger.phases.items():
        highest = max(size for size, _ in expected[name])
        assert peak.bytes == highest
        if highest:
            assert peak.categories in [categories for size, categories in expected[name] if size == highest]
    assert ledger.peak.bytes == max((size for at in expected.values() for size, _ in at), default=0)


@settings(max_examples=200, deadline=None)
@given(histories())
def test_what_is_live_at_the_peak_sums_to_it(history: Recording) -> None:
    ledger = replay(history)
    live = list(ledger.live_at_peak()) if ledger.peak.bytes else []
    assert sum(block.bytes for block in live) == ledger.peak.bytes == sum(ledger.peak.categories.values())
    assert max((sum(at.categories.values()) for at in ledger.timeline), default=0) == ledger.peak.bytes
    for category, size in ledger.peak.categories.items():
        if category is not Category.ROUNDING:
            assert sum(block.requested_bytes for block in live if block.category is category) == size


# -- rule by rule -------------------------------------------------------------------------------------------------


def categories_of(history: Recording) -> dict[int, Category]:
    return {block.address: block.category for block in replay(history).blocks}


def test_a_claim_holds_for_the_whole_life_of_the_block_and_no_longer() -> None:
    history = recording(
        events=[(10, 1, 8), (50, 1, -8), (60, 1, 16), (70, 1, -16)], claims=[claim(40, 1, Category.GRADIENTS)]
    )
    first, second = replay(history).blocks
    assert (first.category, second.category) == (Category.GRADIENTS, Category.TEMPORARIES)


def test_of_several_owners_the_first_in_rank_has_it() -> None:
    history = recording(
        events=[(10, 1, 8)], claims=[claim(20, 1, Category.ACTIVATIONS), claim(30, 1, Category.WEIGHTS)]
    )
    assert categories_of(history) == {1: Category.WEIGHTS}


def test_unclaimed_blocks_are_temporaries_only_within_one_phase() -> None:
    phases = [Mark(0, "forward"), Mark(100, "backward"), Mark(200, "forward")]
    history = recording(
        events=[(10, 1, 8), (20, 1, -8), (30, 2, 8), (110, 2, -8), (40, 3, 8), (210, 3, -8), (50, 4, 8)], phases=phases
    )
    assert categories_of(history) == {
        1: Category.TEMPORARIES,
        2: Category.UNATTRIBUTED,
        3: Category.UNATTRIBUTED,  # freed in a forward phase, but not in its own
        4: Category.UNATTRIBUTED,
    }


def test_clipping_and_the_optimizers_step_are_one_stretch() -> None:
    """A norm made while clipping and dropped while stepping, or the other way round, is temporary."""
    names = ("backward", "optimizer_step", "clip", "optimizer_step", "", "clip")
    phases = [Mark(100 * index, name) for index, name in enumerate(names)]
    lives = {1: (110, 210), 2: (120, 320), 3: (250, 310), 4: (50, 220), 5: (330, 410), 6: (240, 520)}
    events = [event for at, (born, freed) in lives.items() for event in ((born, at, 8), (freed, at, -8))]
    history = recording(events=sorted(events), phases=phases)
    temporary = {address for address, category in categories_of(history).items() if category is Category.TEMPORARIES}
    assert temporary == {1, 2, 3}
    assert list(replay(history).phases) == ["backward", "clip", "optimizer_step"]


def test_blocks_of_the_profilers_own_work_are_left_out() -> None:
    history = recording(
        events=[(10, 1, 8), (110, 2, 800), (120, 3, 80), (130, 1, -8), (180, 2, -800), (210, 3, -80)],
        own=[Interval(100, 200)],
    )
    assert [block.address for block in replay(history).blocks] == [1, 3]  # 3 stayed on: it is someone else's
    assert replay(history).peak.bytes == 88


def test_what_has_a_librarys_size_and_stays_is_its_workspace() -> None:
    history = recording(
        events=[(10, 2, 64), (20, 2, -64)],
        start=[Event(0, 1, 64, 64), Event(0, 3, 63, 63)],
        phases=[Mark(0, "forward"), Mark(15, "backward")],
        workspace_bytes=[64],
    )
    assert categories_of(history) == {
        1: Category.TEMPORARIES,
        2: Category.UNATTRIBUTED,
        3: Category.UNATTRIBUTED,
    }


def test_what_has_a_buckets_size_no_owner_and_stays_is_a_bucket() -> None:
    history = recording(
        events=[(10, 2, 64), (20, 2, -64), (30, 4, 64), (40, 5, 64)],
        start=[Event(0, 1, 64, 64), Event(0, 3, 63, 63)],
        claims=[claim(35, 4, Category.WEIGHTS)],
        bucket_bytes=[64, 64, 64],
    )
    assert categories_of(history) == {
        1: Category.GRADIENTS,
        2: Category.TEMPORARIES,
        3: Category.UNATTRIBUTED,
        4: Category.WEIGHTS,
        5: Category.GRADIENTS,
    }  # and the third is nowhere


def test_a_bucket_that_no_event_tells_of_is_there_all_the_time_where_the_source_does_not_list_what_is_alive() -> None:
    history = recording(events=[(10, 1, 8), (20, 1, -8)], bucket_bytes=[64, 36], claims_make_blocks=True)
    assert replay(history).peak.bytes == 64 + 36 + 8
    assert replay(history).peak.categories[Category.GRADIENTS] == 64 + 36


def test_a_phase_noticed_late_has_what_was_born_since_it_may_have_begun() -> None:
    phases = [Mark(0, "forward"), Mark(100, "backward", since_ns=50)]
    events = [(40, 1, 8), (110, 1, -8), (60, 2, 8), (120, 2, -8), (45, 3, 8), (70, 3, -8)]
    assert categories_of(recording(events=events, phases=phases)) == {
        1: Category.UNATTRIBUTED,  # from before
        2: Category.TEMPORARIES,  # the first gradient, say
        3: Category.TEMPORARIES,  # of forward: logits dropped with the model's output
    }


def test_a_saved_tensor_older_than_the_first_module_is_an_input() -> None:
    history = recording(
        events=[(10, 1, 8), (60, 2, 8)],
        claims=[claim(70, 1, Category.ACTIVATIONS), claim(71, 2, Category.ACTIVATIONS)],
        modules=[Mark(50, "layer"), Mark(90, None)],
    )
    assert categories_of(history) == {1: Category.INPUTS, 2: Category.ACTIVATIONS}


def test_a_saved_tensor_that_autograd_saw_made_is_no_input_however_old() -> None:
    history = recording(
        events=[(10, 2, 8)],
        start=[Event(0, 1, 8, 8)],
        claims=[claim(70, address, Category.ACTIVATIONS, computed=True) for address in (1, 2)],
        modules=[Mark(50, "layer")],
    )
    assert categories_of(history) == {1: Category.ACTIVATIONS, 2: Category.ACTIVATIONS}


def test_where_no_module_ran_nothing_was_there_before_the_first() -> None:
    history = recording(
        events=[(10, 1, 8)],
        claims=[claim(20, 1, Category.ACTIVATIONS)],
        modules=[Mark(50, None)],  # as backward begins
        phases=[Mark(0, "forward"), Mark(51, "backward")],
    )
    assert categories_of(history) == {1: Category.ACTIVATIONS}


def test_a_block_belongs_to_the_module_that_made_it() -> None:
    history = recording(
        events=[(60, 1, 8), (95, 2, 8)],
        claims=[claim(99, 1, Category.ACTIVATIONS, "later")],
        modules=[Mark(50, "layer"), Mark(90, None)],
    )
    assert {block.address: block.module for block in replay(history).blocks} == {1: "layer", 2: None}


def test_a_reused_address_ends_the_block_whose_free_went_unseen() -> None:
    history = recording(events=[(10, 1, 8), (20, 1, 4)])
    assert replay(history).peak.bytes == 8


def test_an_older_block_found_gone_is_freed_but_never_a_younger_one() -> None:
    start = [Event(0, 1, 8, 8), Event(0, 2, 8, 8)]
    history = recording(events=[(20, 2, 4), (50, 3, 1)], start=start, gone=[Gone(30, 1), Gone(30, 2)])
    assert {(block.bytes, block.freed_ns) for block in replay(history).blocks if block.bytes > 1} == {
        (8, 30),
        (8, 20),
        (4, 1 << 63),
    }


def test_claims_stand_for_blocks_where_the_source_cannot_list_them() -> None:
    claims = [claim(500, 1, Category.WEIGHTS, size=64)]
    assert replay(recording(claims=claims)).peak.bytes == 0
    ledger = replay(recording(claims=claims, claims_make_blocks=True))
    assert ledger.peak.bytes == 64
    assert ledger.peak.categories[Category.WEIGHTS] == 64


def test_a_block_found_by_a_claim_ends_where_its_address_is_allocated_or_gone() -> None:
    claims = [claim(5, 1, Category.GRADIENTS, size=64), claim(5, 2, Category.GRADIENTS, size=32)]
    history = recording(events=[(10, 1, 8), (40, 3, 8)], claims=claims, gone=[Gone(20, 2)], claims_make_blocks=True)
    assert {(block.address, block.bytes, block.freed_ns) for block in replay(history).blocks} == {
        (1, 64, 10),
        (2, 32, 20),
        (1, 8, 1 << 63),
        (3, 8, 1 << 63),
    }


def test_a_clock_of_whole_microseconds_still_finds_the_block() -> None:
    events = [(10_000, 1, 8), (20_000, 1, -8)]
    late = [claim(20_400, 1, Category.GRADIENTS)]  # freed at 20_900 really
    assert categories_of(recording(events, late)) == {1: Category.TEMPORARIES}
    assert categories_of(recording(events, late, clock_error_ns=2_000)) == {1: Category.GRADIENTS}


def test_only_counted_steps_have_peaks() -> None:
    history = recording(
        events=[(10, 1, 1000), (20, 1, -1000), (510, 2, 8)],
        phases=[Mark(0, "forward"), Mark(400, ""), Mark(500, "forward")],
        windows=[Window(500, 600, None)],
    )
    ledger = replay(history)
    assert ledger.peak.bytes == 8
    assert [at.time_ns for at in ledger.timeline][-1] == 510


def test_the_timeline_tells_what_stays_live_where_nothing_happens() -> None:
    """Of a busy stretch the highest moment, and, where the next is idle, the last one: it is live all through that."""
    history = recording(
        events=[(100, 1, 64), (101, 2, 900), (102, 2, -900), (600, 3, 32), (601, 4, 8)],
        windows=[Window(0, 1000, None)],
    )
    timeline = [(at.time_ns, sum(at.categories.values())) for at in replay(history, timeline_points=100).timeline]
    assert timeline == [(0, 0), (101, 964), (102, 64), (601, 104)]


def test_the_replay_of_nothing_is_nothing() -> None:
    ledger = replay(Recording("cpu", 0))
    assert (ledger.peak.bytes, ledger.phases, ledger.timeline) == (0, {}, [])
