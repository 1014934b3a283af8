"""A stream of a card for each of the programs that take turns on it (`comm.fibers`).

Programs start what they compute and what they send in turns, and the card does it later: what one computes runs while
what another sends is under way. A transfer of torch.distributed begins when the stream that is current then has come so
far, and who waits for it lets only the stream wait that is current then: so each program's stream is current while it
has its turn.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Streams:
    """Implements `comm.fibers.Lanes`. library: torch.cuda or torch.npu."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._streams: list[Any] = []
        self._reached: list[Any] = []  # how far each stream was when its program gave the turn away
        self._count = 0
        self._caller: Any = None
        self._lane: int | None = None

    def begin(self, count: int) -> None:
        """What the caller has made is there before a program reads it. It lives until `end`, or nothing else is made of
        its memory before that."""
        while len(self._streams) < count:
            self._streams.append(self._library.Stream())
            self._reached.append(self._library.Event())
        self._caller, self._count, self._lane = self._library.current_stream(), count, None
        for stream in self._streams[:count]:
            stream.wait_stream(self._caller)

    def enter(self, lane: int) -> None:
        """A program waits for those before it: it may go on in a request that one of them begins, and read what that
        has written to the cache (`engine.plan.cut`). None waits for one behind it."""
        if self._lane is not None:
            self._reached[self._lane].record(self._streams[self._lane])
        for earlier in range(lane):
            self._streams[lane].wait_event(self._reached[earlier])
        self._library.set_stream(self._streams[lane])
        self._lane = lane

    def end(self, results: Sequence[Any]) -> None:
        """The caller's stream waits for all, and their memory for what the caller does with it."""
        for stream in self._streams[: self._count]:
            self._caller.wait_stream(stream)
        self._library.set_stream(self._caller)
        for result in results:
            if isinstance(result, Tensor):
                result.record_stream(self._caller)
