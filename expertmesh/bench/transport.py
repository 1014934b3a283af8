"""The transport inside a node: an exchange of equal parts among all its ranks, against gloo over loopback."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from expertmesh.bench.exchange import assembled, meet
from expertmesh.bench.gloo import GlooComm, all_to_all
from expertmesh.comm.group import TPGroup
from expertmesh.device import free_memory
from expertmesh.engine.worker import RankProcess, serve
from expertmesh.errors import InputError
from expertmesh.launch.channel import Channel
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
    copied: parts that lay elsewhere. InputError where the memory is too small."""
    found = exchange_seconds(ranks, SIZES, rounds, KINDS)
    seconds = {str(size): kinds for size, kinds in found.items()}
    times = {size: {k: s["gloo"] / s[k] for k in KINDS if k != "gloo"} for size, s in seconds.items()}
    return {"ranks": ranks, "rounds": rounds, "seconds": seconds, "times_faster_than_gloo": times}


def exchange_seconds(
    ranks: int,
    sizes: Sequence[int],
    rounds: int,
    kinds: Sequence[str] = ("in place", "copied"),
    of: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[int, dict[str, float]]:
    """Seconds of one exchange of parts of each size, by kind: "gathered" is a TP group's collective. of: what is taken
    of all rounds. InputError where the memory is too small."""
    check_memory(ranks)
    specs = [{"rank": rank, "ranks": ranks} for rank in range(ranks)]
    found: dict[int, dict[str, list[float]]] = {size: {kind: [] for kind in kinds} for size in sizes}
    with assembled(Here(PRELOAD), PROGRAM, specs, Topology(1, ranks, 1), TIMEOUT) as crew:
        for size in sizes:
            for _ in range(rounds):
                for kind in kinds:
                    answers = crew.ask(
                        [{"do": "measure", "kind": kind, "size": size}] * ranks, f"{size} bytes, {kind}"
                    )
                    found[size][kind].append(max(answers))
    return {size: {kind: of(taken) for kind, taken in kinds_.items()} for size, kinds_ in found.items()}


def check_memory(ranks: int) -> None:
    """InputError where it is too small for the largest parts."""
    # Two generations of them in the shared pools, which keep what they once took, and what gloo sends and receives.
    wanted = 4 * ranks**2 * SIZES[-1]
    if wanted > (free := free_memory()):
        raise InputError(
            f"{ranks} ranks need about {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free here; take fewer ranks"
        )


def serve_rank(spec: dict[str, Any], channel: Channel) -> None:
    """One rank as a process."""
    serve(spec, channel, 1, _Process)


class _Process(RankProcess):
    def __init__(self, spec: dict[str, Any]) -> None:
        topology, self._address = Topology(1, spec["ranks"], 1), spec["address"]
        super().__init__(topology, spec["rank"], self._address, topology.all_ranks(), TIMEOUT)

    def begin(self, message: dict[str, Any]) -> None:
        GlooComm(self.comm, self._address, TIMEOUT)  # makes the default group

    def do(self, message: dict[str, Any]) -> Any:
        """Measure, the only thing that is asked."""
        return self._measure(message["kind"], message["size"])

    def _measure(self, kind: str, size: int) -> float:
        """Seconds of one exchange, each rank reading a byte of every page that it was sent."""
        comm, count, seconds = self.comm, self.comm.topology.ranks, 0.0
        ranks = comm.topology.all_ranks()
        group = TPGroup(comm, ranks, [1] * count)
        whole = torch.empty(count * size if kind != "in place" else 0, dtype=torch.uint8)
        received = torch.empty(count * size if kind == "gloo" else 0, dtype=torch.uint8)
        for turn in range(RUN + 1):
            parts = list(whole.split(size)) if len(whole) else [comm.new(rank, size) for rank in ranks]
            for part in parts:
                part.fill_(turn)
            meet(comm)
            start = time.perf_counter()
            if kind == "gloo":
                all_to_all(received, whole)
                came = [received]
            elif kind == "gathered":
                came = list(group.all_gather(parts[comm.rank][None])[0])
            else:
                came = comm.exchange("dispatch", ranks, parts)
            wrong = sum(int((part[::4096] != turn).sum()) for part in came)
            if turn:  # the first one touches memory for the first time
                seconds += time.perf_counter() - start
            if wrong:
                raise RuntimeError(f"{wrong} pages came damaged")
        return seconds / RUN
