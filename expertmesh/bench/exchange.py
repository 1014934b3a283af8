"""Bytes, messages and time of the exchange by each algorithm, without a model.

Experts are replaced by their weights alone, so that what comes back is known: each row times the sum of its weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from expertmesh.bench.gloo import NAME as PLAIN_COLLECTIVE
from expertmesh.bench.gloo import GlooComm
from expertmesh.bench.workload import Workload, predict
from expertmesh.comm.base import Comm
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.local import LocalWorld
from expertmesh.engine.processes import assemble, tell_standings
from expertmesh.engine.worker import RankProcess, serve
from expertmesh.launch.channel import Channel
from expertmesh.launch.crew import Crew
from expertmesh.launch.interfaces import Counters, interface_of, is_loopback
from expertmesh.launch.launcher import Launcher
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import Phase, Traffic, algorithm

PHASES: tuple[Phase, ...] = ("dispatch", "combine")
PRELOAD = ("torch", "numpy", "greenlet", "expertmesh.bench.exchange")
PROGRAM = "expertmesh.bench.exchange:serve_rank"


class Rank:
    """What one rank measures. interface: counts the bytes of its node, None where there is no such thing."""

    def __init__(
        self, comm: Comm, workload: Workload, interface: str | None = None, plain: Comm | None = None
    ) -> None:
        """plain: the transport of the plain collective."""
        self.comm, self.workload, self.plain = comm, workload, plain
        self.interface = interface if comm.topology.card_of(comm.rank) == 0 else None
        self._x, self._routed = workload.rows(comm.rank), workload.routed(comm.rank)

    def measure(self, name: str) -> dict[str, Any]:
        """Bytes and messages per phase to every rank, what the interface sent and the seconds of each phase in every
        round, and how far the rows that came back are from what they should be."""
        workload, (experts, weights) = self.workload, self._routed
        comm, how = self.comm, algorithm("flat" if name == PLAIN_COLLECTIVE else name)
        if name == PLAIN_COLLECTIVE:
            assert self.plain is not None
            comm = self.plain
        exchange = TieredExchange(comm, workload.placement, how, workload.cut if comm is self.comm else 1)
        seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        counters: dict[str, list[list[int]]] = {phase: [] for phase in PHASES}
        for _ in range(workload.rounds):
            comm.sent.clear()
            with _Timed(self, seconds["dispatch"], counters["dispatch"]):
                received = exchange.dispatch(0, self._x, experts, weights)
            y = (received.x_RD.float() * received.weights_RK.sum(-1, keepdim=True)).to(self._x.dtype)
            with _Timed(self, seconds["combine"], counters["combine"]):
                back = exchange.combine(y, received)
        expected = self._x.float() * weights.sum(-1, keepdim=True)
        sent = comm.sent
        return {
            "bytes": {phase: sent.bytes[phase].tolist() for phase in PHASES},
            "messages": {phase: sent.messages[phase].tolist() for phase in PHASES},
            "interface": counters,
            "seconds": seconds,
            "error": float((back.float() - expected).norm() / expected.norm()),
        }

    def count(self) -> Counters:
        return Counters.of(self.interface) if self.interface else Counters(0, 0)


class _Timed:
    """Seconds from when all ranks are there until this one is through, and what the interface sends until all are."""

    def __init__(self, rank: Rank, seconds: list[float], counters: list[list[int]]) -> None:
        self._rank, self._seconds, self._counters = rank, seconds, counters

    def __enter__(self) -> None:
        meet(self._rank.comm)
        self._before = self._rank.count()
        meet_in_node(self._rank.comm)  # nobody of the node sends before it has been read
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        meet(self._rank.comm)
        sent = self._rank.count() - self._before
        self._counters.append([sent.payload, sent.bytes])


def meet(comm: Comm) -> None:
    """Wait until all ranks are here, in three small exchanges: in each node, across nodes, and in each node again.
    Their bytes are counted as attention's, which nothing else is here."""
    meet_in_node(comm)
    _meet(comm, comm.topology.rail_ranks(comm.rank))
    meet_in_node(comm)


def meet_in_node(comm: Comm) -> None:
    """Wait until all ranks of the node are here."""
    _meet(comm, comm.topology.node_ranks(comm.rank))


def _meet(comm: Comm, ranks: Sequence[int]) -> None:
    comm.exchange("attention", ranks, [torch.zeros(1, dtype=torch.uint8)] * len(ranks), [1] * len(ranks))


def bench_exchange(
    workload: Workload,
    names: Sequence[str],
    launcher: Launcher | None = None,
    of: Callable[["np.ndarray[Any, Any]"], Any] = np.median,
) -> dict[str, Any]:
    """The report of `expertmesh bench exchange`; everything against `flat`, which is always measured. launcher: starts
    the ranks, which are then processes; of: which of a phase's seconds is taken of all rounds."""
    names = list(dict.fromkeys(["flat", *names]))
    if launcher is not None:
        ranks, rate = _as_processes(workload, names, launcher), launcher.rate
    else:
        ranks, rate = _as_threads(workload, names), None
    predicted = {name: predict(workload, name) for name in names}
    measured = _Measured(workload, ranks)
    counted = {name: measured.across(name) for name in names}
    seconds = {name: measured.seconds(name, of) for name in names}
    return {
        "nodes": workload.nodes,
        "cards": workload.cards,
        "tokens_per_rank": workload.tokens,
        "hidden": workload.hidden,
        "experts": workload.experts,
        "redundant": workload.redundant,
        "ranks": "processes" if launcher else "threads",
        "link_bits_per_second": rate,
        "cross_node_bytes": counted,
        "predicted_cross_node_bytes": {
            name: _phases(*(t.across(phase, workload.topology) for phase in PHASES)) for name, t in predicted.items()
        },
        "interface_bytes": {name: measured.interface(name, 0) for name in names} if measured.has_interface else None,
        "interface_bytes_with_headers": (
            {name: measured.interface(name, 1) for name in names} if measured.has_interface else None
        ),
        "messages": {name: measured.messages(name) for name in names},
        "in_node_bytes": {name: measured.in_node(name) for name in names},
        "seconds": seconds,
        "ideal_seconds": {
            name: _phases(*(_ideal(t, phase, workload, rate) for phase in PHASES)) for name, t in predicted.items()
        } if rate else None,
        "reduction": {name: _less(c["total"], counted["flat"]["total"]) for name, c in counted.items()},
        "time_reduction": {name: _less(s["total"], seconds["flat"]["total"]) for name, s in seconds.items()},
        "card_imbalance": predicted["flat"].imbalance,
        "relative_error": {name: max(rank[name]["error"] for rank in ranks) for name in names},
    }  # fmt: skip


class _Measured:
    """What all ranks measured, together."""

    def __init__(self, workload: Workload, ranks: list[dict[str, Any]]) -> None:
        self._ranks = ranks
        nodes = np.arange(workload.topology.ranks) // workload.topology.cards_per_node
        self._crosses = nodes[:, None] != nodes

    def _table(self, name: str, what: str, phase: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
        return np.array([rank[name][what][phase] for rank in self._ranks])

    def across(self, name: str) -> dict[str, int]:
        return _phases(*(int(self._table(name, "bytes", p)[self._crosses].sum()) for p in PHASES))

    def in_node(self, name: str) -> dict[str, int]:
        return _phases(*(int(self._table(name, "bytes", p)[~self._crosses].sum()) for p in PHASES))

    def messages(self, name: str) -> dict[str, int]:
        return _phases(*(int(self._table(name, "messages", p).sum()) for p in PHASES))

    def seconds(self, name: str, of: Callable[["np.ndarray[Any, Any]"], Any]) -> dict[str, float]:
        """Of the slowest rank in each round."""
        return _phases(*(float(of(self._table(name, "seconds", p).max(0))) for p in PHASES))

    @property
    def has_interface(self) -> bool:
        return bool(self.interface("flat", 1)["total"])

    def interface(self, name: str, which: int) -> dict[str, int]:
        """Median over the rounds of what all nodes sent. which: 0 without headers, 1 with them."""
        return _phases(
            *(int(np.median(self._table(name, "interface", p)[:, :, which].sum(0))) for p in PHASES)
        )


def _phases(dispatch: Any, combine: Any) -> dict[str, Any]:
    return {"dispatch": dispatch, "combine": combine, "total": dispatch + combine}


def _less(value: float, base: float) -> float:
    return 1 - value / base if base else 0.0


def _ideal(predicted: Traffic, phase: Phase, workload: Workload, rate: float) -> float:
    """Seconds that the bytes of the busiest link take, headers not counted."""
    bytes_RR = predicted.dispatch_RR if phase == "dispatch" else predicted.combine_RR
    nodes, cards = workload.nodes, workload.cards
    between = bytes_RR.reshape(nodes, cards, nodes, cards).sum((1, 3))
    np.fill_diagonal(between, 0)
    return float(max(between.sum(0).max(), between.sum(1).max())) * 8 / rate


def _as_threads(workload: Workload, names: Sequence[str]) -> list[dict[str, Any]]:
    def program(comm: Comm) -> dict[str, Any]:
        rank = Rank(comm, workload)
        return {name: rank.measure(name) for name in names}

    return LocalWorld(workload.topology, workload.timeout).run(program)


def _as_processes(workload: Workload, names: Sequence[str], launcher: Launcher) -> list[dict[str, Any]]:
    ranks = workload.topology.ranks
    specs = [{"workload": asdict(workload), "rank": rank} for rank in range(ranks)]
    with assembled(launcher, PROGRAM, specs, workload.topology, workload.timeout) as crew:
        found = [
            crew.ask([{"do": "measure", "name": name}] * ranks, f"the measurement of {name}")
            for name in names
        ]
    return [{name: one[rank] for name, one in zip(names, found, strict=True)} for rank in range(ranks)]


@contextmanager
def assembled(
    launcher: Launcher, program: str, specs: Sequence[dict[str, Any]], topology: Topology, timeout: float
) -> Iterator[Crew]:
    """Ranks that have met, until the end of the block; also where they stand, on SIGUSR1."""
    crew, _ = assemble(launcher, program, specs, topology, timeout)
    with closing(crew):
        tell_standings(crew)
        yield crew


def serve_rank(spec: dict[str, Any], channel: Channel) -> None:
    """One rank as a process."""
    serve(spec, channel, 1, _Process)


class _Process(RankProcess):
    def __init__(self, spec: dict[str, Any]) -> None:
        self._workload, self._address = Workload(**spec["workload"]), spec["address"]
        topology = self._workload.topology
        super().__init__(topology, spec["rank"], self._address, topology.all_ranks(), self._workload.timeout)
        self._plain: Comm | None = None

    def do(self, message: dict[str, Any]) -> Any:
        """Measure, the only thing that is asked."""
        if message["name"] == PLAIN_COLLECTIVE:
            self._plain = self._plain or GlooComm(self.comm, self._address, self._workload.timeout)
        interface = None if is_loopback(self._address) else interface_of(self._address)
        return Rank(self.comm, self._workload, interface, self._plain).measure(message["name"])
