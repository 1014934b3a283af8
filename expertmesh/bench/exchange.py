"""Bytes, messages and time of the exchange by each algorithm, on routing of a given shape, without a model.

Experts are replaced by their weights alone, so that what comes back is known: each row times the sum of its weights.
"""

import selectors
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.comm.base import Comm
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.local import LocalWorld
from expertmesh.comm.process import ENVIRONMENT, ProcessComm, host_store
from expertmesh.engine.checkpoint import free_memory
from expertmesh.engine.ranks import MOST_RANKS
from expertmesh.errors import InputError, RankFailure
from expertmesh.kernels import Routing
from expertmesh.kernels.reference import route
from expertmesh.launch.channel import Channel, ChannelClosed
from expertmesh.launch.forkserver import ForkServer
from expertmesh.mesh.placement import Placement, default_placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import Traffic, algorithm, traffic

PLAIN = "bfloat16"


@dataclass(frozen=True)
class Workload:
    """One layer's exchange. The defaults are DeepSeek-V3's."""

    nodes: int = 8
    cards: int = 8
    tokens: int = 64
    hidden: int = 7168
    experts: int = 256
    groups: int = 8
    groups_per_token: int = 4
    experts_per_token: int = 8
    redundant: int = 0
    seed: int = 0
    rounds: int = 3
    timeout: float = 300.0

    def check(self) -> None:
        """InputError where this cannot be run."""
        for name in self.__dataclass_fields__:
            low = int(name not in ("redundant", "seed"))
            if not low <= getattr(self, name) <= 1 << 31:
                raise InputError(f"{name} is {getattr(self, name)}, but must be from {low} to {1 << 31}")
        if self.experts % self.groups:
            raise InputError(f"{self.groups} groups do not divide {self.experts} experts")
        if self.groups_per_token > self.groups:
            raise InputError(f"{self.groups_per_token} groups a token, but there are {self.groups}")
        if self.topology.ranks > MOST_RANKS:
            raise InputError(f"{self.topology.ranks} ranks on one machine; at most {MOST_RANKS} are possible")
        if self.experts_per_token > self.experts // self.groups * self.groups_per_token:
            raise InputError(
                f"{self.groups_per_token} groups hold fewer than {self.experts_per_token} experts"
            )
        # The flat algorithm holds a copy of a row for every choice, packed, on its way and as a result.
        wanted = self.topology.ranks * self.tokens * self.hidden * self.experts_per_token * 2 * 5
        if wanted > (free := free_memory()):
            raise InputError(
                f"{self.topology.ranks} ranks with {self.tokens} rows each need about {wanted / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free here; take fewer ranks, tokens or hidden"
            )
        _ = self.placement  # refuses what has no room

    @property
    def topology(self) -> Topology:
        return Topology(self.nodes, self.cards, 1)

    @cached_property
    def placement(self) -> Placement:
        return default_placement(self.experts, [0], self.topology, self.redundant)

    def routed(self, rank: int) -> tuple[Tensor, Tensor]:
        """Experts and weights of a rank's rows: scores uniform in (0, 1), chosen by the model's own rule."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank)
        scores = torch.rand(self.tokens, self.experts, generator=generator).clamp(1e-6, 1 - 1e-6)
        routing = Routing(
            self.experts_per_token, self.groups, self.groups_per_token, "noaux_tc", "sigmoid", True, 2.5
        )
        return route(scores.logit(), None, routing)

    def rows(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank + 500_000)
        return torch.randn(self.tokens, self.hidden, generator=generator).to(torch.bfloat16)


def predict(workload: Workload, name: str) -> Traffic:
    """What `mesh.traffic` says of an algorithm."""
    topology, placement = workload.topology, workload.placement
    choices = placement.choices(0, topology)
    slots = [choices[rank][workload.routed(rank)[0].numpy()] for rank in range(topology.ranks)]
    return traffic(slots, topology, placement.slots_per_rank, workload.hidden, PLAIN, algorithm(name))


def measure_rank(comm: Comm, workload: Workload, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What one rank sees, by algorithm: its bytes and messages per phase to every rank, the seconds of each phase
    in every round, and how far the rows that came back are from what they should be."""
    x, (experts, weights) = workload.rows(comm.rank), workload.routed(comm.rank)
    expected = x.float() * weights.sum(-1, keepdim=True)
    out = {}
    for name in names:
        exchange = TieredExchange(comm, workload.placement, algorithm(name))
        seconds: dict[str, list[float]] = {"dispatch": [], "combine": []}
        for _ in range(workload.rounds):
            comm.sent.clear()
            _meet(comm)
            start = time.perf_counter()
            received = exchange.dispatch(0, x, experts, weights)
            _meet(comm)
            seconds["dispatch"].append(time.perf_counter() - start)
            y = (received.x_RD.float() * received.weights_RK.sum(-1, keepdim=True)).to(x.dtype)
            _meet(comm)
            start = time.perf_counter()
            back = exchange.combine(y, received)
            _meet(comm)
            seconds["combine"].append(time.perf_counter() - start)
        out[name] = {
            "bytes": {k: v.tolist() for k, v in comm.sent.bytes.items() if k != "attention"},
            "messages": {k: v.tolist() for k, v in comm.sent.messages.items() if k != "attention"},
            "seconds": seconds,
            "error": float((back.float() - expected).norm() / expected.norm()),
        }
    return out


def _meet(comm: Comm) -> None:
    """Wait until all ranks are here; its bytes are counted as attention's, which nothing else is here."""
    ranks = comm.topology.all_ranks()
    comm.exchange("attention", ranks, [torch.zeros(1, dtype=torch.uint8)] * len(ranks), [1] * len(ranks))


def bench_exchange(workload: Workload, names: Sequence[str], processes: bool) -> dict[str, Any]:
    """The report of `expertmesh bench exchange`; bytes against `flat`, which is always measured."""
    names = list(dict.fromkeys(["flat", *names]))
    predicted = {name: predict(workload, name) for name in names}
    ranks = _as_processes(workload, names) if processes else _as_threads(workload, names)
    topology = workload.topology
    nodes = np.arange(topology.ranks) // topology.cards_per_node
    crosses = nodes[:, None] != nodes

    def across(name: str, phase: str) -> int:
        return int(np.array([rank[name]["bytes"][phase] for rank in ranks])[crosses].sum())

    counted = {name: _phases(across(name, "dispatch"), across(name, "combine")) for name in names}
    base = counted["flat"]["total"]
    return {
        "nodes": workload.nodes,
        "cards": workload.cards,
        "tokens_per_rank": workload.tokens,
        "hidden": workload.hidden,
        "experts": workload.experts,
        "redundant": workload.redundant,
        "ranks": "processes" if processes else "threads",
        "cross_node_bytes": counted,
        "predicted_cross_node_bytes": {
            name: _phases(t.across("dispatch", topology), t.across("combine", topology))
            for name, t in predicted.items()
        },
        "interface_bytes": None,
        "messages": {name: _sum_phases([rank[name]["messages"] for rank in ranks]) for name in names},
        "in_node_bytes": {
            name: _phases(
                *(
                    int(np.array([r[name]["bytes"][p] for r in ranks]).sum()) - counted[name][p]
                    for p in PHASES
                )
            )
            for name in names
        },
        "seconds": {name: _seconds([rank[name]["seconds"] for rank in ranks]) for name in names},
        "reduction": {name: 1 - counted[name]["total"] / base if base else 0.0 for name in names},
        "card_imbalance": predicted["flat"].imbalance,
        "relative_error": {name: max(rank[name]["error"] for rank in ranks) for name in names},
    }


PHASES = ("dispatch", "combine")


def _phases(dispatch: Any, combine: Any) -> dict[str, Any]:
    return {"dispatch": dispatch, "combine": combine, "total": dispatch + combine}


def _sum_phases(tables: list[dict[str, list[int]]]) -> dict[str, int]:
    return _phases(*(sum(sum(table[phase]) for table in tables) for phase in PHASES))


def _seconds(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Median over the rounds of the slowest rank."""
    slowest = (np.array([rank[phase] for rank in ranks]).max(0) for phase in PHASES)
    return _phases(*(float(np.median(rounds)) for rounds in slowest))


def _as_threads(workload: Workload, names: Sequence[str]) -> list[dict[str, Any]]:
    world = LocalWorld(workload.topology, workload.timeout)
    return world.run(lambda comm: measure_rank(comm, workload, names))


def _as_processes(workload: Workload, names: Sequence[str]) -> list[dict[str, Any]]:
    store = host_store()
    common = {"workload": asdict(workload), "names": list(names), "port": store.port}
    specs = [common | {"rank": rank} for rank in range(workload.topology.ranks)]
    with ForkServer(("torch", "numpy", "expertmesh.bench.exchange")) as server:
        program = "expertmesh.bench.exchange:serve_rank"
        processes = server.start(program, specs, ENVIRONMENT)
        found: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(processes):
                selector.register(process.channel, selectors.EVENT_READ, rank)
            while len(found) < len(processes):
                for event, _ in selector.select():
                    rank = event.data
                    try:
                        found[rank] = processes[rank].channel.receive()
                    except ChannelClosed:
                        status = processes[rank].wait(1.0)
                        raise RankFailure(
                            f"rank {rank} ended with status {status} before it was done"
                        ) from None
                    selector.unregister(processes[rank].channel)
        return [found[rank] for rank in range(len(processes))]


def serve_rank(spec: dict[str, Any], channel: Channel) -> None:
    """One rank as a process."""
    torch.set_num_threads(1)
    workload = Workload(**spec["workload"])
    comm = ProcessComm(workload.topology, spec["rank"], spec["port"], workload.timeout)
    channel.send(measure_rank(comm, workload, spec["names"]))
    comm.close()
