"""How all ranks compute the next step: in one piece, or in two micro-batches of which one computes while the rows of
the other travel. No torch."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from expertmesh.request import Batch, Slice

TRIALS = 3  # steps of each kind before one is preferred
# Steps until another kind is tried again, twice: soon at first, when little is known, then twice as late each time.
# It may cost twice as much, and then 2% are lost in the end.
SOON, LATE = 8, 100
KEPT = 8  # steps that a judgement is based on
PIECE = 1 << 15  # bytes of a rank's rows in one piece of the exchange
MOST_PIECES = 4  # more of them cost more time than they hide


@dataclass(frozen=True)
class Plan:
    """The same for all ranks. micro_batches: 1 or 2; pieces: of a rank's rows in the exchange; split: how replicas
    are chosen (`comm.replicas`); rows: of a rank, at most."""

    micro_batches: int
    pieces: int
    split: str
    rows: int


class Way(NamedTuple):
    """What a planner has a choice of."""

    micro_batches: int
    split: str


@dataclass
class Spent:
    """On steps of one way, of all sizes."""

    steps: int = 0
    seconds: float = 0.0


def pieces_of(rows: int, row_bytes: int) -> int:
    """Pieces of the exchange for so many rows of a rank."""
    return min(MOST_PIECES, max(1, rows * row_bytes // PIECE))


class Planner:
    """Decides before each step, and learns from how long it took.

    Cutting a step hides the time on the wire behind the computation, and makes that longer: the weights are read
    twice, and every matrix product is smaller. Counts of the same step level the ranks better than those of the last
    one, and have to be waited for. Which is more depends on the model, the links and the number of rows, so "auto"
    tries what there is on steps of about the same size and keeps to the fastest. With few rows that may be even shares:
    then counts are more bytes than what they level.
    """

    def __init__(self, mode: str, row_bytes: int, wire: bool, splits: Sequence[str] = ("even",)) -> None:
        """mode: auto, on or off; row_bytes: of a hidden state; wire: whether rows travel to other nodes at all;
        splits: ways to choose replicas that may be tried (`comm.replicas`)."""
        self._mode, self._row_bytes, self._wire = mode, row_bytes, wire
        self._splits = tuple(splits)
        self._seen: dict[tuple[int, int], _Seen] = {}
        self.spent: dict[Way, Spent] = {}

    def plan(self, batches: Sequence[Batch], ranks_of_group: int) -> Plan:
        rows = max(batch.rows for batch in batches)
        of_rank = -(-rows // ranks_of_group)
        pieces = pieces_of(of_rank, self._row_bytes) if self._wire else 1
        cuts: tuple[int, ...] = (1,)
        if rows >= 2 and self._mode != "off":
            cuts = (2,) if self._mode == "on" else (1, 2) if self._wire else (1,)
        options = [Way(cut, split) for split in self._splits for cut in cuts]
        if len(options) == 1:
            return Plan(options[0].micro_batches, pieces, options[0].split, of_rank)
        way = self._seen.setdefault(_kind(batches), _Seen(options)).choose()
        return Plan(way.micro_batches, pieces, way.split, of_rank)

    def took(self, batches: Sequence[Batch], plan: Plan, seconds: float) -> None:
        """A step has been computed."""
        way = Way(plan.micro_batches, plan.split)
        spent = self.spent.setdefault(way, Spent())
        spent.steps, spent.seconds = spent.steps + 1, spent.seconds + seconds
        if (seen := self._seen.get(_kind(batches))) is not None:
            seen.add(way, seconds / max(batch.rows for batch in batches))


def _kind(batches: Sequence[Batch]) -> tuple[int, int]:
    """Steps of one kind take about the same time per row: half octaves of the rows, and of those that decode."""
    rows = max(batch.rows for batch in batches)
    decoding = max(sum(s.decodes for s in batch.slices) for batch in batches)
    return round(2 * math.log2(rows)) if rows else -1, round(2 * math.log2(decoding)) if decoding else -1


class _Seen:
    """Seconds per row of the last steps of one kind, by the way they were computed."""

    def __init__(self, options: Sequence[Way]) -> None:
        self._seconds: dict[Way, deque[float]] = {way: deque(maxlen=KEPT) for way in options}
        self._steps = 0
        self._again, self._pause = SOON, SOON
        self._fastest, self._turn = options[0], 0

    def choose(self) -> Way:
        fewest = min(self._seconds, key=lambda way: len(self._seconds[way]))
        if len(self._seconds[fewest]) < TRIALS:
            return fewest
        # What disturbs a step makes it longer: the shortest is nearest to the truth.
        fastest = min(self._seconds, key=lambda way: min(self._seconds[way]))
        if fastest != self._fastest:
            self._fastest, self._pause, self._again = fastest, SOON, self._steps + SOON
        if self._steps > self._again:  # two steps: one may be disturbed
            self._pause = min(LATE, 2 * self._pause)
            self._again = self._steps + self._pause
            self._turn += 1
        others = [way for way in self._seconds if way != fastest]
        return others[self._turn % len(others)] if self._steps >= self._again - 1 else fastest

    def add(self, way: Way, seconds: float) -> None:
        if way in self._seconds:
            self._steps += 1
            self._seconds[way].append(seconds)


def cut(batch: Batch) -> tuple[Batch, Batch]:
    """Two micro-batches of as many rows. The second may go on in a request whose beginning is in the first: in every
    layer that has been written to the cache before."""
    left = -(-batch.rows // 2)
    first: list[Slice] = []
    second: list[Slice] = []
    for part in batch.slices:
        here = min(left, part.count)
        left -= here
        if here:
            first.append(replace(part, count=here))
        if here < part.count:
            second.append(replace(part, start=part.start + here, count=part.count - here))
    return Batch.of(first), Batch.of(second)
