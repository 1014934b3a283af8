"""Several programs of one rank in one thread: one computes while the rows of another travel."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from greenlet import greenlet

T = TypeVar("T")


class Lanes(Protocol):
    """What programs that take turns have of their own besides their stack: on a card, a stream (`comm.streams`)."""

    def begin(self, count: int) -> None:
        """So many programs are to run."""
        ...

    def enter(self, lane: int) -> None:
        """What is computed from now on is this program's."""
        ...

    def end(self, results: Sequence[Any]) -> None:
        """All have ended, and what is computed from now on is their caller's, who gets these."""
        ...


class Shared:
    """Nothing of their own: an op has been computed when it returns. Implements `Lanes`."""

    def begin(self, count: int) -> None:
        pass

    def enter(self, lane: int) -> None:
        pass

    def end(self, results: Sequence[Any]) -> None:
        pass


class Turns:
    """Programs take turns in a fixed order, each until it calls `turn` or ends.

    Where a program does so is the same on all ranks, so all of them start the same exchanges in the same order. The
    programs share the thread, and so its state in torch: a mode (inference, grad) is opened around `run`, never inside
    a program.
    """

    def __init__(self, lanes: Lanes = Shared()) -> None:  # noqa: B008 (stateless)
        self.lane = 0  # number of the program that runs
        self._lanes = lanes
        self._fibers: list[greenlet] = []

    def turn(self) -> None:
        """Let each of the others run until its next turn. Outside of `run`: nothing."""
        mine = self.lane
        if self._next() not in (None, mine):
            self._switch()
            self.lane = mine
            self._lanes.enter(mine)

    def run(self, programs: Sequence[Callable[[], T]]) -> list[T]:
        """What the programs return, in their order. Where one raises, the others end too, and that is raised."""
        results: dict[int, T] = {}

        def call(lane: int, program: Callable[[], T]) -> None:
            self._lanes.enter(lane)
            results[lane] = program()

        self._fibers = [greenlet(lambda p=pair: call(*p)) for pair in enumerate(programs)]
        self.lane = len(programs) - 1  # the first is next
        self._lanes.begin(len(programs))
        try:
            while self._next() is not None:
                self._switch()  # comes back when a program has ended
        finally:
            for fiber in self._fibers:
                if not fiber.dead:
                    fiber.throw()
            self._fibers, self.lane = [], 0
            self._lanes.end(list(results.values()))
        return [results[lane] for lane in range(len(programs))]

    def _next(self) -> int | None:
        """The program whose turn is next, the one that runs now being the last choice."""
        count = len(self._fibers)
        lanes = ((self.lane + step) % count for step in range(1, count + 1))
        return next((lane for lane in lanes if not self._fibers[lane].dead), None)

    def _switch(self) -> None:
        lane = self._next()
        assert lane is not None
        self.lane = lane
        self._fibers[lane].switch()
