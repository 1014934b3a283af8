"""Ranks as threads of one process: rows change hands without a copy."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from expertmesh.comm.base import ByteCount, Comm, CommError, Purpose
from expertmesh.mesh.topology import Topology

T = TypeVar("T")


@dataclass
class _Meeting:
    """Where the ranks of one group exchange. Two tables take turns: a rank can be one exchange ahead of the slowest,
    never two, so nobody writes where somebody still reads."""

    size: int
    tables: tuple[dict[int, Sequence[Tensor]], dict[int, Sequence[Tensor]]] = field(
        default_factory=lambda: ({}, {})
    )
    arrived: int = 0
    round: int = 0
    wake: threading.Condition = field(default_factory=threading.Condition)


class LocalWorld:
    """What the threads of one cluster share. `fail` ends every exchange that is under way, and all later ones."""

    def __init__(self, topology: Topology, timeout: float) -> None:
        self.topology, self.timeout = topology, timeout
        self._lock = threading.Lock()
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._problem: str | None = None

    def comm(self, rank: int) -> "LocalComm":
        return LocalComm(self, rank)

    def fail(self, problem: str) -> None:
        self._problem = self._problem or problem
        with self._lock:
            meetings = list(self._meetings.values())
        for meeting in meetings:
            with meeting.wake:
                meeting.wake.notify_all()

    def run(self, program: Callable[[Comm], T]) -> list[T]:
        """Call a program on every rank, each in a thread of its own. Returns what they return, in their order; where
        one raises, all end, and what it raised is raised here."""
        results: list[T | BaseException] = [CommError("not run")] * self.topology.ranks

        def serve(rank: int) -> None:
            torch.set_num_threads(1)
            try:
                results[rank] = program(self.comm(rank))
            except BaseException as error:
                results[rank] = error
                if not isinstance(error, CommError):
                    self.fail(f"rank {rank} failed: {error}")

        threads = [
            threading.Thread(target=serve, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(self.topology.ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed:
            raise min(failed, key=lambda error: isinstance(error, CommError))
        return [r for r in results if not isinstance(r, BaseException)]

    def meet(self, ranks: tuple[int, ...], rank: int, parts: Sequence[Tensor]) -> list[Tensor]:
        """Put down my parts, wait for the others', take what is mine."""
        with self._lock:
            meeting = self._meetings.setdefault(ranks, _Meeting(len(ranks)))
        with meeting.wake:
            turn = meeting.round
            table = meeting.tables[turn % 2]
            if not meeting.arrived:
                table.clear()
            table[rank] = parts
            meeting.arrived += 1
            if meeting.arrived == meeting.size:
                meeting.arrived, meeting.round = 0, turn + 1
                meeting.wake.notify_all()
            while meeting.round == turn and self._problem is None:
                if not meeting.wake.wait(self.timeout):
                    late = ", ".join(str(r) for r in ranks if r not in table)
                    self._problem = f"rank {late} did not come to an exchange within {self.timeout:g} s"
            if self._problem is not None:
                raise CommError(self._problem)
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
