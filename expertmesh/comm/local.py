"""Ranks as threads of one process: rows change hands without a copy."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, CommError, Done, Purpose
from expertmesh.mesh.topology import Topology

T = TypeVar("T")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Meeting:
    """One exchange of a group: what each rank has put down, and a lock for each that waits, held until the last one
    has come. It is forgotten when all have taken what is theirs."""

    table: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    waiting: list["threading.Lock"] = field(default_factory=list)
    taken: int = 0


# Group, fiber and the number of the exchange in these.
_Key: TypeAlias = tuple[tuple[int, ...], int, int]


class LocalWorld:
    """What the threads of one cluster share. `fail` ends every exchange that is under way, and all later ones.

    Only as many ranks compute at a time as there are cores (`turn`): every torch op lets go of the interpreter, and
    with more threads than cores that are ready to take it, most of the time goes into handing it over.
    """

    def __init__(self, topology: Topology, timeout: float) -> None:
        self.topology, self.timeout = topology, timeout
        self.turn = threading.BoundedSemaphore(cores())
        self._lock = threading.Lock()
        self._meetings: dict[_Key, _Meeting] = {}
        self._problem: str | None = None

    def comm(self, rank: int) -> "LocalComm":
        return LocalComm(self, rank)

    def fail(self, problem: str) -> None:
        with self._lock:
            self._problem = self._problem or problem
            for meeting in self._meetings.values():
                for lock in meeting.waiting:
                    lock.release()
                meeting.waiting.clear()

    def run(self, program: Callable[[Comm], T]) -> list[T]:
        """Call a program on every rank, each in a thread of its own. Returns what they return, in their order; where
        one raises, all end, and what it raised is raised here."""
        results: list[T | BaseException] = [CommError("not run")] * self.topology.ranks

        def serve(rank: int) -> None:
            torch.set_num_threads(1)
            try:
                with self.turn:
                    results[rank] = program(self.comm(rank))
            except BaseException as error:
                results[rank] = error
                if not isinstance(error, CommError):
                    self.fail(f"rank {rank} failed: {error}")

        default = torch.get_num_threads()
        threads = [
            threading.Thread(target=serve, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(self.topology.ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.set_num_threads(default)  # of other threads of this process: the ranks have changed it
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed:
            raise min(failed, key=lambda error: isinstance(error, CommError))
        return [r for r in results if not isinstance(r, BaseException)]

    def put(self, key: _Key, rank: int, parts: Sequence[Tensor]) -> None:
        """Put down my parts of an exchange."""
        with self._lock:
            if self._problem is not None:
                raise CommError(self._problem)
            meeting = self._meetings.setdefault(key, _Meeting())
            meeting.table[rank] = parts
            if len(meeting.table) == len(key[0]):
                for lock in meeting.waiting:
                    lock.release()
                meeting.waiting.clear()

    def take(self, key: _Key, rank: int) -> list[Tensor]:
        """Wait for the others' parts, take what is mine. Called by who has the turn, which others get while it
        waits."""
        ranks, mine = key[0], None
        with self._lock:
            meeting = self._meetings[key]
            if len(meeting.table) < len(ranks):
                if self._problem is not None:
                    raise CommError(self._problem)
                mine = threading.Lock()
                mine.acquire()
                meeting.waiting.append(mine)
        if mine is not None:
            self.turn.release()
            if not mine.acquire(timeout=self.timeout):
                late = ", ".join(str(r) for r in ranks if r not in meeting.table)
                self.fail(f"rank {late} did not come to an exchange within {self.timeout:g} s")
            self.turn.acquire()
            if len(meeting.table) < len(ranks):
                raise CommError(self._problem or "an exchange was given up")
        with self._lock:
            meeting.taken += 1
            if meeting.taken == len(ranks):
                del self._meetings[key]
        me = ranks.index(rank)
        return [meeting.table[r][me] for r in ranks]


class LocalComm(Comm):
    """One thread's end."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        super().__init__(world.topology, rank)
        self._world = world
        self._count: Counter[tuple[tuple[int, ...], int]] = Counter()

    def start(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> "Done | _LocalTransfer":
        self.sent.add(purpose, ranks, [p.numel() for p in parts], announced=sizes is None)
        if len(ranks) == 1:
            return Done(list(parts))
        group = tuple(ranks), self.turns.lane
        key = (*group, self._count[group])
        self._count[group] += 1
        self._world.put(key, self.rank, parts)
        return _LocalTransfer(self._world, key, self.rank)


@dataclass(frozen=True)
class _LocalTransfer:
    """Implements `comm.base.Transfer`."""

    world: LocalWorld
    key: _Key
    rank: int

    def wait(self) -> list[Tensor]:
        return self.world.take(self.key, self.rank)
