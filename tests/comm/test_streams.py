"""Streams of programs that take turns, on a stand-in for torch.cuda: who waits for whom, and in which order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.comm.fibers import Turns
from expertmesh.comm.streams import Streams
from tests.support.cards import Library

CALLER = "stream 0"


def followed(log: list[Any], first: str) -> list[Any]:
    """Everything that was computed, with all that it is certain to run after: what waits say, step by step."""
    now, seen, events, done = first, {}, {}, []
    for entry in log:
        if entry[0] == "current":
            now = entry[1]
        elif entry[1] == "records":
            events[entry[2]] = set(seen.get(entry[0], ()))
        elif entry[1] == "waits for":
            of = entry[2]
            behind = events.get(of, set()) if isinstance(of, tuple) or of is None else seen.get(of, set())
            seen[entry[0]] = seen.get(entry[0], set()) | behind
        else:
            done.append((entry, now, frozenset(seen.get(now, ()))))
            seen.setdefault(now, set()).add(entry)
    return done


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_a_program_runs_after_those_before_it_and_not_after_those_behind(lengths: list[int]) -> None:
    library = Library()
    turns = Turns(Streams(library))

    def program(lane: int) -> None:
        for step in range(lengths[lane] + 1):
            library.log.append(((lane, step), "computes"))
            if step < lengths[lane]:
                turns.turn()

    for _ in range(2):
        library.log.clear()
        library.log.append((("caller", 0), "computes"))
        turns.run([partial(program, lane) for lane in range(len(lengths))])
        library.log.append((("caller", 1), "computes"))
        done = followed(library.log, CALLER)
        after = {entry[0]: {other[0] for other in before} for entry, _, before in done}
        streams = {entry[0]: stream for entry, stream, _ in done}
        programs = [(lane, step) for lane, length in enumerate(lengths) for step in range(length + 1)]
        for lane, step in programs:
            own = {(lane, s) for s in range(step)}
            # As far as those before it have come when it has its turn; of those behind it, nothing.
            earlier = {(e, s) for e in range(lane) for s in range(min(step, lengths[e]) + 1)}
            assert after[lane, step] == own | earlier | {("caller", 0)}
        assert after["caller", 1] == {*programs, ("caller", 0)}
        assert len({streams[lane, 0] for lane in range(len(lengths))} | {CALLER}) == 1 + len(lengths)
        assert all(streams[lane, step] == streams[lane, 0] for lane, step in programs)
        assert library.current_stream() is library.default


class Held(torch.Tensor):
    """Knows which streams its memory waits for."""

    held: list[str]

    def record_stream(self, stream: Any) -> None:
        self.held.append(stream.name)


def test_results_are_kept_until_their_caller_has_read_them() -> None:
    library = Library()

    def result() -> Tensor:
        made = torch.ones(2).as_subclass(Held)
        made.held = []
        return made

    programs: list[Callable[[], Any]] = [result, result, lambda: None]
    first, second, nothing = Turns(Streams(library)).run(programs)
    assert first.held == second.held == [CALLER] and nothing is None


def test_a_program_that_raises_gives_the_stream_back() -> None:
    library = Library()
    turns = Turns(Streams(library))

    def broken() -> None:
        turns.turn()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        turns.run([broken, turns.turn])
    assert library.current_stream() is library.default
