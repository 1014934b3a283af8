"""How a step is computed: what a cut leaves as it was, and that the faster way is found and kept to."""

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.engine.plan import LATE, MOST_PIECES, PIECE, TRIALS, Plan, Planner, cut, pieces_of
from expertmesh.request import Batch, Slice
from tests.support.fake import request_of

WIDE = PIECE  # bytes of a row: one row is a piece


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Some end where their request's tokens do."""
    counts = draw(st.lists(st.integers(1, 1) | st.integers(1, 30), max_size=12))
    slices = []
    for number, count in enumerate(counts):
        start, more = draw(st.integers(0, 9)), draw(st.sampled_from([0, 0, 3]))
        slices.append(Slice(request_of(number, [1] * (start + count + more), 5), start, count))
    return Batch.of(slices)


def of_rows(rows: int, decoding: int = 0) -> Batch:
    """One prompt, and requests that decode."""
    one = tuple(Slice(request_of(n, [1], 5), 0, 1) for n in range(decoding))
    more = rows - decoding
    return Batch(one + ((Slice(request_of(decoding, [1] * more, 5), 0, more),) if more else ()))


@given(batches())
def test_a_cut_keeps_every_row_once_and_in_order(batch: Batch) -> None:
    first, second = cut(batch)
    assert 0 <= first.rows - second.rows <= 1 and first.rows + second.rows == batch.rows
    places = [
        [(s.request.id, p) for s in part.slices for p in range(s.start, s.start + s.count)]
        for part in (batch, first, second)
    ]
    assert sorted(places[1] + places[2]) == sorted(places[0])
    # What a row reads of its own request is in its own half, or in the one that goes ahead in every layer.
    for request, position in places[1]:
        assert all(position < later for r, later in places[2] if r == request)
    for part in (first, second):
        decoding = [s.decodes for s in part.slices]
        assert decoding == sorted(decoding, reverse=True) and all(s.count for s in part.slices)
        assert len({s.request.id for s in part.slices}) == len(part.slices)
    sampling = [s.request.id for s in batch.slices if s.samples]
    found = [s.request.id for part in (first, second) for s in part.slices if s.samples]
    assert sorted(found) == sorted(sampling)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**5))
def test_more_rows_or_wider_ones_are_cut_into_no_fewer_pieces(a: int, b: int, c: int, d: int) -> None:
    found = pieces_of(a, c)
    assert 1 <= found <= MOST_PIECES
    assert found <= pieces_of(a + b, c) and found <= pieces_of(a, c + d)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_what_is_asked_for_is_done(rows: list[int], tp: int, wire: bool) -> None:
    """All groups alike, by the one that has most; what a rank sends is cut where it crosses nodes."""
    several = [of_rows(n) for n in rows]
    pieces = pieces_of(-(-max(rows) // tp), WIDE) if wire else 1
    for mode, micro_batches in (("off", 1), ("on", 2 if max(rows) > 1 else 1)):
        planner = Planner(mode, WIDE, wire)
        for _ in range(5):
            plan = planner.plan(several, tp)
            assert plan == Plan(micro_batches, pieces, "even", -(-max(rows) // tp))
            planner.took(several, plan, 1.0)


@pytest.mark.parametrize(("rows", "wire"), [(1, True), (0, True), (50, False)])
def test_what_nothing_can_be_gained_by_is_never_tried(rows: int, wire: bool) -> None:
    """A single row, no rows, no link between nodes."""
    planner, several = Planner("auto", 1, wire), [of_rows(0), of_rows(rows)]
    for _ in range(3 * LATE):
        plan = planner.plan(several, 1)
        assert plan.micro_batches == 1
        planner.took(several, plan, 1.0)


def run(
    planner: Planner, steps: Sequence[Batch], seconds: Callable[[Batch, int], tuple[float, float]]
) -> tuple[float, list[int]]:
    """What all steps take over what they take in the better way, and how each was computed. seconds: of a step whole,
    and cut."""
    took, both, chosen = 0.0, [0.0, 0.0], []
    for number, batch in enumerate(steps):
        plan = planner.plan([of_rows(0), batch], 1)
        times = seconds(batch, number)
        planner.took([of_rows(0), batch], plan, times[plan.micro_batches - 1])
        took += times[plan.micro_batches - 1]
        both = [total + time for total, time in zip(both, times, strict=True)]
        chosen.append(plan.micro_batches)
    return took / min(both), chosen


def disturbed(rng: random.Random) -> float:
    """By how much longer a step takes than it should: mostly little, now and then much."""
    return 1 + rng.expovariate(20) + (rng.expovariate(1) if rng.random() < 0.1 else 0)


@given(st.floats(0.6, 1.7), st.integers(0, 2**32), st.sampled_from([2, 9, 64]), st.booleans())
def test_auto_loses_little_to_the_better_way(ratio: float, seed: int, rows: int, prompt: bool) -> None:
    rng = random.Random(seed)
    steps = [of_rows(rows, 0 if prompt else rows)] * 600

    def seconds(_: Batch, __: int) -> tuple[float, float]:
        time = disturbed(rng)
        return time, ratio * time

    lost, _ = run(Planner("auto", 1, True), steps, seconds)
    assert lost < 1.03


@given(st.floats(1.2, 1.7), st.integers(0, 2**32), st.booleans())
def test_auto_follows_a_machine_that_changes(ratio: float, seed: int, cut_first: bool) -> None:
    """One way becomes slower, or the other one faster, or the whole machine slower: found out within some hundreds
    of steps."""
    rng = random.Random(seed)
    count = 4 * LATE
    orders = [(ratio, 1.0), (1.0, ratio), (1.0, 1 / ratio), (2.0, 2 * ratio)]
    orders = orders if cut_first else [(b, a) for a, b in orders]

    def seconds(_: Batch, number: int) -> tuple[float, float]:
        whole, halves = orders[number // count]
        time = disturbed(rng)
        return whole * time, halves * time

    _, chosen = run(Planner("auto", 1, True), [of_rows(64)] * count * len(orders), seconds)
    for number, (whole, halves) in enumerate(orders):
        settled = chosen[(number + 1) * count - 2 * LATE : (number + 1) * count]
        took = [whole if ways == 1 else halves for ways in settled]
        assert sum(took) < 1.03 * min(whole, halves) * len(settled)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.0, 40.0))
def test_auto_knows_steps_of_different_size_apart(seed: int, fixed: float) -> None:
    """Long steps gain by a cut, short ones lose, in any order; rows vary a little, and part of the time is the same
    for any number of them."""
    rng = random.Random(seed)
    steps = [of_rows(round(rng.choice([8, 512]) * rng.uniform(0.9, 1.1))) for _ in range(1600)]

    def seconds(batch: Batch, _: int) -> tuple[float, float]:
        whole = (fixed + batch.rows) * disturbed(rng)
        return whole, whole * (0.8 if batch.rows > 64 else 1.4)

    planner = Planner("auto", 1, True)
    for size in (0, 64):
        some = [batch for batch in steps if (batch.rows > 64) == (size == 64)]
        lost, _ = run(planner, some, seconds)
        assert lost < 1.04


# --- Several ways to share rows out to replicas


def ways_of(planner: Planner, steps: int, seconds: Callable[[Plan], float], rows: int = 64) -> list[Plan]:
    """How each of so many steps was computed."""
    found, several = [], [of_rows(rows)]
    for _ in range(steps):
        found.append(planner.plan(several, 1))
        planner.took(several, found[-1], seconds(found[-1]))
    return found


@pytest.mark.parametrize("fastest", [(cut_, split) for cut_ in (1, 2) for split in ("last", "now", "even")])
def test_every_way_is_tried_and_the_fastest_kept(fastest: tuple[int, str]) -> None:
    def seconds(plan: Plan) -> float:
        return 1.0 if (plan.micro_batches, plan.split) == fastest else 1.3

    found = ways_of(Planner("auto", 1, True, ("last", "now", "even")), 4 * LATE, seconds)
    ways = [(plan.micro_batches, plan.split) for plan in found]
    tried = [(cut_, split) for split in ("last", "now", "even") for cut_ in (1, 2)]
    assert set(ways[: TRIALS * len(tried)]) == set(tried)
    assert all(ways[: TRIALS * len(tried)].count(way) == TRIALS for way in tried)
    late = ways[-2 * LATE :]
    assert late.count(fastest) > 0.95 * len(late)
    # All the others are looked at again, not always the same.
    assert set(ways[TRIALS * len(tried) :]) == set(tried)


@given(st.floats(1.2, 1.7), st.integers(0, 2**32), st.booleans())
def test_a_split_that_becomes_the_faster_one_is_found(ratio: float, seed: int, on: bool) -> None:
    rng, count, steps = random.Random(seed), 6 * LATE, 0
    planner = Planner("on" if on else "off", 1, True, ("last", "now"))

    def seconds(plan: Plan) -> float:
        nonlocal steps
        steps += 1
        slow = "now" if steps <= count else "last"
        return disturbed(rng) * (ratio if plan.split == slow else 1.0)

    found = ways_of(planner, 2 * count, seconds)
    assert {plan.micro_batches for plan in found} == {2 if on else 1}
    for part, split in ((found[:count], "last"), (found[count:], "now")):
        late = [plan.split for plan in part[-2 * LATE :]]
        assert late.count(split) > 0.9 * len(late)


@pytest.mark.parametrize("split", ["even", "now", "last"])
@pytest.mark.parametrize(
    ("mode", "wire", "rows"), [("off", True, 64), ("on", True, 64), ("auto", False, 64), ("auto", True, 1)]
)
def test_with_one_split_and_one_cut_nothing_is_tried(split: str, mode: str, wire: bool, rows: int) -> None:
    found = ways_of(Planner(mode, 1, wire, (split,)), 3 * LATE, lambda _: 1.0, rows)
    assert set(found) == {found[0]} and found[0].split == split
    assert found[0].micro_batches == (2 if mode == "on" else 1)


def test_a_step_of_one_row_tries_splits_alone() -> None:
    found = ways_of(Planner("auto", 1, True, ("last", "now")), LATE, lambda _: 1.0, rows=1)
    assert {(plan.micro_batches, plan.split) for plan in found} == {(1, "last"), (1, "now")}
