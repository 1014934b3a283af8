"""What an engine of any size might tell of itself, made up: for metrics and for the dashboard."""

from typing import Any

import numpy as np

from expertmesh.engine.arrays import to_plain
from expertmesh.engine.parts import RANK_PARTS
from expertmesh.engine.tally import QUEUE_BOUNDS, STEP_PARTS
from expertmesh.mesh.balance import even_cards
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.topology import Topology

PURPOSES = ("attention", "dispatch", "combine", "counts", "weights")


def state_of(
    nodes: int = 2,
    cards: int = 4,
    layers: tuple[int, ...] = (1, 2, 3, 4),
    experts: int = 64,
    redundant: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """A busy engine. Of DeepSeek-V3: state_of(8, 8, tuple(range(3, 61)), 256, 64)."""
    rng = np.random.default_rng(seed)
    topology = Topology(nodes, cards, cards)
    placement = default_placement(experts, layers, topology, redundant)
    ranks = topology.ranks
    recent_LE = rng.lognormal(0, 0.7, (len(layers), experts)) * 100
    cards_LR = even_cards(placement, recent_LE)
    links_NN = rng.integers(1, 1 << 24, (nodes, nodes)) + np.eye(nodes, dtype=np.int64) * (1 << 25)
    parts_RP = rng.uniform(0.5, 1.5, (ranks, len(RANK_PARTS))) * [0.04, 0.02, 0.03, 0.06, 0.03]
    sizes = {name: [int(x) for x in rng.integers(1, 1 << 26, 2)] for name in PURPOSES}
    requests = [
        {
            "id": str(n), "group": n % topology.groups, "state": "running" if n < 10 else "waiting", "age": 40.0 - n,
            "prompt": 100 + n, "cached": 32 * (n % 2), "computed": 100 + 9 * n, "output": 8 * n, "max_tokens": 400,
            "preemptions": 0,
        }
        for n in range(12)
    ]  # fmt: skip
    return {
        "problem": None,
        "time": 1_790_000_000.0 + seed,
        "uptime": 4000.0,
        "model": {
            "layers": len(layers) + layers[0],
            "experts": experts,
            "experts_per_token": 8,
            "max_context": 4096,
        },
        "cluster": {
            "nodes": nodes, "cards_per_node": cards, "attention_tp": cards, "groups": topology.groups,
            "ranks": "processes", "exchange": "two_tier", "rebalance": "auto",
        },
        "requests": {
            "running": [10 // topology.groups] * topology.groups,
            "waiting": [1] * topology.groups,
            "submitted": 300,
            "finished": {"stop": 200, "length": 70, "abort": 3},
            "preemptions": 2,
            "list": requests,
        },
        "tokens": {"prompt": 40_000, "cached": 9_000, "generated": 80_000, "rows": 130_000},
        "queue": {"bounds": list(QUEUE_BOUNDS), "counts": [*range(len(QUEUE_BOUNDS)), 1], "sum": 12.5},
        "cache": {
            "pages": [256] * topology.groups,
            "used": [int(n) for n in rng.integers(20, 200, topology.groups)],
            "page_size": 32,
        },
        "steps": {"count": 2000, "seconds": dict(zip(STEP_PARTS, (0.5, 80.0, 1.0, 0.7), strict=True))},
        "recent": {
            "steps": 200, "rows": 5000, "prompt_tokens": 1000, "cached_tokens": 100, "generated_tokens": 4000,
            "seconds": 10.0, "step_seconds": dict(zip(STEP_PARTS, (0.05, 8.0, 0.1, 0.07), strict=True)),
        },
        "balance": {
            "mode": "auto", "doing": "watching", "imbalance": 1.1, "looks": 30, "plans": 5, "refused": 2, "swaps": 9,
            "moved": 60, "moved_bytes": 7_000_000, "seconds": 0.8, "failures": 0, "error": None,
        },
        "events": [{"time": 1_790_000_000.0 + n, "text": f"Experts moved: {n}"} for n in range(5)],
        "ranks": [{"host": f"host{topology.node_of(r)}", "pid": 4000 + r, "silence": 0.1} for r in range(ranks)],
        "seconds": 0.3,
        "experts": {
            "layers": list(layers),
            "total": to_plain(recent_LE * 50, "<i8"),
            "recent": to_plain(recent_LE, "<i4"),
            "cards": to_plain(cards_LR, "<f4"),
            "imbalance": (cards_LR.max(1) / cards_LR.mean(1)).tolist(),
        },
        "placement": {"version": 9, "slots": to_plain(placement.slots_LRS, "<i2")},
        "links": {
            "bytes": {name: [50 * x for x in each] for name, each in sizes.items()},
            "nodes": (50 * links_NN).tolist(),
            "recent": links_NN.tolist(),
            "recent_bytes": sizes,
        },
        "parts": {
            "names": list(RANK_PARTS),
            "steps": 250,
            "seconds": (25 * parts_RP).tolist(),
            "recent_steps": 25,
            "recent": (25 * parts_RP).tolist(),
        },
    }  # fmt: skip
