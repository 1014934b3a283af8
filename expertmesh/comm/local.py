"""Ranks as threads of one process: rows change hands without a copy."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from expertmesh.comm.base import ByteCount, Comm, CommError, Purpose
from expertmesh.mesh.topology import Topology

T = TypeVar("T")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Meeting:
    """Where the ranks of one group exchange. Two tables take turns: a rank can be one exchange ahead of the slowest,
    never two, so nobody writes where somebody still reads."""

    size: int
    tables: tuple[dict[int, Sequence[Tensor]], dict[int, Sequence[Tensor]]] = field(
        default_factory=lambda: ({}, {})
    )
    round: int = 0
    # One lock for each rank that waits, held until the last one has come.
    waiting: dict[int, "threading.Lock"] = field(default_factory=dict)


class LocalWorld:
    """What the threads of one cluster share. `fail` ends every exchange that is under way, and all later ones.

    Only as many ranks compute at a time as there are cores (`turn`): every torch op lets go of the interpreter, and
    with more threads than cores that are ready to take it, most of the time goes into handing it over.
    """

    def __init__(self, topology: Topology, timeout: float) -> None:
        self.topology, self.timeout = topology, timeout
        self.turn = threading.BoundedSemaphore(cores())
        self._lock = threading.Lock()
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._problem: str | None = None

    def comm(self, rank: int) -> "LocalComm":
        return LocalComm(self, rank)

    def fail(self, problem: str) -> None:
        with self._lock:
            self._problem = self._problem or problem
            for meeting in self._meetings.values():
                for lock in meeting.waiting.values():
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

    def meet(self, ranks: tuple[int, ...], rank: int, parts: Sequence[Tensor]) -> list[Tensor]:
        """Put down my parts, wait for the others', take what is mine. Called by who has the turn, which others get
        while it waits."""
        mine: threading.Lock | None = None
        with self._lock:
            if self._problem is not None:
                raise CommError(self._problem)
            meeting = self._meetings.setdefault(ranks, _Meeting(len(ranks)))
            table = meeting.tables[meeting.round % 2]
            if not meeting.waiting:
                table.clear()
            table[rank] = parts
            if len(table) == meeting.size:
                meeting.round += 1
                for lock in meeting.waiting.values():
                    lock.release()
                meeting.waiting.clear()
            else:
                mine = meeting.waiting[rank] = threading.Lock()
                mine.acquire()
        if mine is not None:
            self.turn.release()
            came = mine.acquire(timeout=self.timeout)
            if not came:
                late = ", ".join(str(r) for r in ranks if r not in table)
                self.fail(f"rank {late} did not come to an exchange within {self.timeout:g} s")
            self.turn.acquire()
            if len(table) < meeting.size:
                raise CommError(self._problem or "an exchange was given up")
        me = ranks.index(rank)
        return [table[r][me] for r in ranks]


class LocalComm:
    """One thread's end. Implements `comm.base.Comm`."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        self.topology, self.rank = world.topology, rank
        self.sent = ByteCount(world.topology, rank)
        self._world = world

    def exchange(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        self.sent.add(purpose, ranks, [p.numel() for p in parts], announced=sizes is None)
        if len(ranks) == 1:
            return list(parts)
        return self._world.meet(tuple(ranks), self.rank, parts)
