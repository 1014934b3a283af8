"""The transport inside a node: an exchange of equal parts among all its ranks, against gloo over loopback."""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from expertmesh.bench.exchange import meet
from expertmesh.bench.gloo import GlooComm
from expertmesh.comm.process import ProcessComm
from expertmesh.comm.seat import Seat
from expertmesh.engine.processes import introduce
from expertmesh.launch.channel import Channel
from expertmesh.launch.crew import Crew
from expertmesh.launch.duty import Duty
from expertmesh.launch.launcher import Here
from expertmesh.mesh.topology import Topology

SIZES = tuple(1 << shift for shift in range(12, 23, 2))  # bytes for each pair of ranks: 4 KiB to 4 MiB
KINDS = ("in place", "copied", "gloo")
PRELOAD = ("torch", "numpy", "greenlet", "expertmesh.bench.transport")
PROGRAM = "expertmesh.bench.transport:serve_rank"
TIMEOUT = 120.0
RUN = 5  # exchanges in a measurement


def bench_transport(ranks: int, rounds: int) -> dict[str, Any]:
    """Seconds of one exchange, by size and kind, medians over rounds in which the kinds take turns, and how many times
    faster than gloo. in place: parts that were written where others read them, as the engine's exchange does it;
    copied: parts that lay elsewhere."""
    topology = Topology(1, ranks, 1)
    crew = Crew(
        Here(PRELOAD), PROGRAM, [{"rank": r, "ranks": ranks} for r in range(ranks)], topology, TIMEOUT
    )
    found: dict[int, dict[str, list[float]]] = {size: {kind: [] for kind in KINDS} for size in SIZES}
    try:
        introduce(crew)
        for size in SIZES:
            for _ in range(rounds):
                for kind in KINDS:
                    answers = crew.ask(
                        [{"do": "measure", "kind": kind, "size": size}] * ranks, f"{size} bytes, {kind}"
                    )
                    found[size][kind].append(max(answers))
    finally:
        crew.close()
    seconds = {
        str(size): {kind: statistics.median(taken) for kind, taken in kinds.items()}
        for size, kinds in found.items()
    }
    times = {size: {k: s["gloo"] / s[k] for k in KINDS if k != "gloo"} for size, s in seconds.items()}
    return {"ranks": ranks, "rounds": rounds, "seconds": seconds, "times_faster_than_gloo": times}


def serve_rank(spec: dict[str, Any], channel: Channel) -> None:
    """One rank as a process."""
    torch.set_num_threads(1)
    duty = Duty(spec, channel)
    duty.serve(_Process(spec).obey)


class _Process:
    def __init__(self, spec: dict[str, Any]) -> None:
        topology, self._address = Topology(1, spec["ranks"], 1), spec["address"]
        self._seat = Seat(topology, spec["rank"], self._address, topology.all_ranks())
        self._comm: ProcessComm | None = None

    def obey(self, message: dict[str, Any]) -> Any:
        """Do what the message says; returns the answer."""
        if message["do"] == "place":
            return self._seat.place()
        if message["do"] == "meet":
            self._comm = self._seat.meet(message, TIMEOUT, TIMEOUT)
            GlooComm(self._comm, self._address, TIMEOUT)  # makes the default group
            return None
        return self._measure(message["kind"], message["size"])

    def _measure(self, kind: str, size: int) -> float:
        """Seconds of one exchange, each rank reading a byte of every page that it was sent."""
        assert self._comm is not None
        comm, count, seconds = self._comm, self._comm.topology.ranks, 0.0
        ranks = comm.topology.all_ranks()
        whole, received = torch.empty(2, count * size if kind != "in place" else 0, dtype=torch.uint8)
        for turn in range(RUN + 1):
            parts = list(whole.split(size)) if len(whole) else [comm.new(rank, size) for rank in ranks]
            for part in parts:
                part.fill_(turn)
            meet(comm)
            start = time.perf_counter()
            if kind == "gloo":
                dist.all_to_all_single(received, whole)
                came = [received]
            else:
                came = comm.exchange("dispatch", ranks, parts)
            wrong = sum(int((part[::4096] != turn).sum()) for part in came)
            if turn:  # the first one touches memory for the first time
                seconds += time.perf_counter() - start
            if wrong:
                raise RuntimeError(f"{wrong} pages came damaged")
        return seconds / RUN
