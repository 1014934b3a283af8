"""What an engine tells of itself while it runs, as plain data: for metrics, for the dashboard, for anybody who asks.

The engine's own counters (`engine.tally`) cost nothing to read. Those of the ranks have to be asked for, between two
steps, so that is done once a second at most, and less often where asking takes long: never more than `SHARE` of the
time. Counters are since the start; what is under `recent` is of the last seconds, a difference of two readings.
"""

import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from expertmesh.engine.arrays import to_plain
from expertmesh.engine.balancer import BalanceState
from expertmesh.engine.engine import Engine
from expertmesh.engine.interrupts import held_back
from expertmesh.engine.parts import RANK_PARTS
from expertmesh.engine.processes import ProcessRanks
from expertmesh.mesh.balance import even_cards, split_cards
from expertmesh.mesh.loads import Floats
from expertmesh.mesh.placement import Ints, Placement
from expertmesh.request import Request

PERIOD = 0.5  # seconds between two snapshots
READING = 1.0  # seconds between two readings of the ranks' counters, at least
SHARE = 0.005  # of the time, that readings may take
WINDOW = 10.0  # seconds that `recent` is about
LISTED = 64  # requests that are told one by one, the oldest
EVENTS = 100  # of the balancer that are remembered

Snapshot: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """Counters at one moment. loads_LE: rows that chose each expert; links_NN: bytes from node to node, its own
    included; purposes: bytes in node and across; parts_RP: seconds of each rank by part, over `measured` steps."""

    time: float
    steps: int
    rows: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seconds: dict[str, float]
    split: float
    loads_LE: Ints
    links_NN: Ints
    purposes: dict[str, tuple[int, int]]
    measured: int
    parts_RP: Floats
    resets: int


class Telemetry:
    """Of one engine. The engine's thread calls `snapshot` between two steps, when `due` says so."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started, self._snapped = time.monotonic(), -PERIOD
        self._spent, self._next_reading = 0.0, 0.0
        self._readings: deque[Reading] = deque()
        self._arrays: Snapshot = {}
        self._news = News()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._snapped >= PERIOD

    def snapshot(self) -> Snapshot:
        """Everything, as numbers, texts, lists and bytes (`engine.arrays`). RankFailure where a rank fails."""
        begin = self._snapped = time.monotonic()
        if begin >= self._next_reading:
            with held_back():  # an answer that nobody waits for would end the ranks
                self._read()
            self._arrays = self._of_experts() | self._of_links()
            taken = time.monotonic() - begin
            self._next_reading = begin + max(READING, taken / SHARE)
        if self._engine.balancer is not None:
            for text in self._news.of(self._engine.balancer.state):
                self._events.append({"time": time.time(), "text": text})
        engine, tally = self._engine, self._engine.tally
        found: Snapshot = {
            "time": time.time(),
            "uptime": begin - self._started,
            "model": self._model(),
            "cluster": self._cluster(),
            "requests": self._requests(begin),
            "tokens": {
                "prompt": tally.prompt_tokens,
                "cached": tally.cached_tokens,
                "generated": tally.generated_tokens,
                "rows": tally.rows,
            },
            "queue": asdict(tally.queued) | {"bounds": list(tally.queued.bounds)},
            "cache": self._cache(),
            "steps": {"count": tally.steps, "seconds": dict(tally.seconds)},
            "recent": self._recent(),
            "balance": engine.balancer.report() if engine.balancer else None,
            "events": list(self._events),
            "ranks": self._ranks(),
            "seconds": self._spent,
        }
        found |= self._arrays
        self._spent += time.monotonic() - begin
        return found

    # Counters of the ranks

    def _read(self) -> None:
        """One reading more. Where no step came after the last one, nothing has changed and nobody is asked."""
        tally, ranks = self._engine.tally, self._engine.ranks
        last = self._readings[-1] if self._readings else None
        if last is not None and last.resets != ranks.resets:
            self._readings.clear()
            last = None
        if last is not None and last.steps == tally.steps:
            loads_LE, links_NN, purposes = last.loads_LE, last.links_NN, last.purposes
            measured, parts_RP = last.measured, last.parts_RP
        else:
            loads_LE, (links_NN, purposes) = self._loads(), self._sent()
            measured, parts_RP = self._parts()
        now = time.monotonic()
        self._readings.append(
            Reading(
                now, tally.steps, tally.rows, tally.prompt_tokens, tally.cached_tokens, tally.generated_tokens,
                dict(tally.seconds), tally.split, loads_LE, links_NN, purposes, measured, parts_RP, ranks.resets,
            )
        )  # fmt: skip
        while len(self._readings) > 2 and self._readings[1].time <= now - WINDOW:
            self._readings.popleft()

    def _loads(self) -> Ints:
        """Rows that chose each expert [L, E], of layers with routed experts."""
        model, counts = self._engine.model, self._engine.ranks.loads()
        loads_LE = np.zeros((len(model.moe_layers), model.n_routed_experts), dtype=np.int64)
        for row, layer in enumerate(model.moe_layers):
            if layer in counts:
                loads_LE[row] = counts[layer].numpy()
        return loads_LE

    def _sent(self) -> tuple[Ints, dict[str, tuple[int, int]]]:
        topology = self._engine.layout.topology
        links_NN = np.zeros((topology.nodes, topology.nodes), dtype=np.int64)
        purposes: dict[str, tuple[int, int]] = {}
        for sent in self._engine.ranks.sent():
            node = topology.node_of(sent.rank)
            for purpose, to_R in sent.bytes.items():
                to_N = to_R.reshape(topology.nodes, topology.cards_per_node).sum(1)
                links_NN[node] += to_N
                inside, across = purposes.get(purpose, (0, 0))
                purposes[purpose] = inside + int(to_N[node]), across + int(to_N.sum() - to_N[node])
        return links_NN, purposes

    def _parts(self) -> tuple[int, Floats]:
        by_rank = self._engine.ranks.parts()
        parts_RP = np.array([[seconds[part] for part in RANK_PARTS] for _, seconds in by_rank])
        return (by_rank[0][0] if by_rank else 0), parts_RP.reshape(len(by_rank), len(RANK_PARTS))

    # What is made of them

    def _of_experts(self) -> Snapshot:
        """Loads by expert and by card, and where the experts are. What a card gets is worked out from the placement, by
        how most of the time rows were shared out to replicas."""
        first, last = self._readings[0], self._readings[-1]
        placement, recent_LE = self._placement(), last.loads_LE - first.loads_LE
        split = last.split - first.split > (last.seconds["ranks"] - first.seconds["ranks"]) / 2
        cards_LR = (split_cards if split else even_cards)(placement, recent_LE.astype(np.float64))
        mean_L = cards_LR.mean(1)
        imbalance_L = np.where(mean_L > 0, cards_LR.max(1) / np.maximum(mean_L, 1e-9), 1.0)
        balancer = self._engine.balancer
        return {
            "experts": {
                "layers": list(placement.layers),
                "total": to_plain(last.loads_LE, "<i8"),
                "recent": to_plain(recent_LE, "<i4"),
                "cards": to_plain(cards_LR, "<f4"),
                "imbalance": imbalance_L.tolist(),
            },
            "placement": {
                "version": balancer.state.swaps if balancer else 0,
                "slots": to_plain(placement.slots_LRS, "<i2"),
            },
        }

    def _of_links(self) -> Snapshot:
        first, last = self._readings[0], self._readings[-1]
        return {
            "links": {
                "bytes": {purpose: list(sizes) for purpose, sizes in last.purposes.items()},
                "nodes": last.links_NN.tolist(),
                "recent": (last.links_NN - first.links_NN).tolist(),
                "recent_bytes": {
                    purpose: [now - before for now, before in zip(sizes, first.purposes.get(purpose, (0, 0)),
                              strict=True)]
                    for purpose, sizes in last.purposes.items()
                },
            },
            "parts": {
                "names": list(RANK_PARTS),
                "steps": last.measured,
                "seconds": last.parts_RP.tolist(),
                "recent_steps": last.measured - first.measured,
                "recent": (last.parts_RP - first.parts_RP).tolist(),
            },
        }  # fmt: skip

    def _placement(self) -> Placement:
        balancer = self._engine.balancer
        return balancer.placement if balancer else self._engine.layout.placement

    def _recent(self) -> Snapshot:
        first, last = self._readings[0], self._readings[-1]
        names = ("steps", "rows", "prompt_tokens", "cached_tokens", "generated_tokens")
        return {name: getattr(last, name) - getattr(first, name) for name in names} | {
            "seconds": last.time - first.time,
            "step_seconds": {part: last.seconds[part] - first.seconds[part] for part in last.seconds},
        }

    # What the engine knows itself

    def _model(self) -> Snapshot:
        model = self._engine.model
        return {
            "layers": model.num_hidden_layers,
            "experts": model.n_routed_experts,
            "experts_per_token": model.num_experts_per_tok,
            "max_context": self._engine.config.max_context,
        }

    def _cluster(self) -> Snapshot:
        topology, config = self._engine.layout.topology, self._engine.config
        return {
            "nodes": topology.nodes,
            "cards_per_node": topology.cards_per_node,
            "attention_tp": topology.tp,
            "groups": topology.groups,
            "ranks": config.ranks,
            "exchange": config.exchange,
            "rebalance": config.rebalance,
        }

    def _requests(self, now: float) -> Snapshot:
        tally, schedulers = self._engine.tally, self._engine.scheduler.schedulers
        everyone = [(r, g, "running") for g, s in enumerate(schedulers) for r in s.running]
        everyone += [(r, g, "waiting") for g, s in enumerate(schedulers) for r in s.waiting]
        everyone.sort(key=lambda each: tally.since.get(each[0].id, now))

        def told(request: Request, group: int, state: str) -> Snapshot:
            return {
                "id": request.id,
                "group": group,
                "state": state,
                "age": now - tally.since.get(request.id, now),
                "prompt": request.prompt_length,
                "cached": request.cached_tokens,
                "computed": request.computed,
                "output": request.output_length,
                "max_tokens": request.params.max_tokens,
                "preemptions": request.preemptions,
            }

        return {
            "running": [len(s.running) for s in schedulers],
            "waiting": [len(s.waiting) for s in schedulers],
            "submitted": tally.submitted,
            "finished": dict(tally.finished),
            "preemptions": self._engine.scheduler.preemptions,
            "list": [told(*each) for each in everyone[:LISTED]],
        }

    def _cache(self) -> Snapshot:
        caches = [s.cache for s in self._engine.scheduler.schedulers]
        return {
            "pages": [cache.pages for cache in caches],
            "used": [cache.pages - cache.free for cache in caches],
            "page_size": caches[0].page_size,
        }

    def _ranks(self) -> list[Snapshot]:
        """Who computes, and seconds since each was last heard: threads are heard at every step."""
        ranks, topology = self._engine.ranks, self._engine.layout.topology
        if isinstance(ranks, ProcessRanks):
            heard = ranks.crew.silence()
            members = zip(ranks.crew.members, heard, strict=True)
            return [{"host": m.host, "pid": m.pid, "silence": silence} for m, silence in members]
        host = socket.gethostname()
        return [{"host": host, "pid": None, "silence": 0.0} for _ in range(topology.ranks)]


class News:
    """What a balancer decided, as sentences."""

    def __init__(self) -> None:
        self._last = self._begun = BalanceState("")

    def of(self, state: BalanceState) -> list[str]:
        """What is new since the last call."""
        old, new = self._last, replace(state)
        self._last = new
        told = []
        imbalance = (
            "" if new.imbalance is None else f"; the fullest card has {new.imbalance:.2f} times the mean"
        )
        if new.refused > old.refused:
            told.append(f"A plan was refused: moving would cost more time than it gains{imbalance}")
        if new.doing == "moving" and old.doing != "moving":
            self._begun = old
            told.append(f"A plan pays: experts begin to move{imbalance}")
        elif new.doing != "moving" and new.moved > self._begun.moved:
            moved, size = new.moved - self._begun.moved, new.moved_bytes - self._begun.moved_bytes
            told.append(f"Experts moved: {moved}, {size / 1e6:.1f} MB{imbalance}")
            self._begun = new
        if new.failures > old.failures:
            told.append(f"Failed: {new.error}")
        return told
