"""Copies and bytes against the law that the engine counts by; published times of exchanges."""

import csv
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from expertmesh.mesh.locality import Gate
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS, Phase, algorithm, traffic
from expertmesh.planner.cards import card
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.exchange import bandwidth, copies, crossing_bytes, exchange
from expertmesh.planner.models import model
from expertmesh.planner.parameters import parameters
from expertmesh.planner.work import Rates

V3, A2 = model("deepseek-v3"), card("ascend-910b")
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "planner" / "alltoall.csv"
TOKENS = 256  # of each rank


def counted(topology: Topology, name: str, phase: Phase, scattered: bool) -> float:
    """Bytes that cross nodes, of one token: as the engine's law counts them, over tokens that a gate chose."""
    experts_TK = Gate(8, 4, 8).sample(np.ones(256), topology.ranks * TOKENS, seed=1)
    if scattered:
        experts_TK = np.random.default_rng(2).permutation(256)[experts_TK]
    placement = default_placement(256, (3,), topology)
    slots = placement.choices(3, topology)
    per_rank = experts_TK.reshape(topology.ranks, TOKENS, 8)
    chosen = [slots[rank][experts] for rank, experts in enumerate(per_rank)]
    found = traffic(chosen, topology, placement.slots_per_rank, V3.hidden_size, "bfloat16", algorithm(name))
    return found.across(phase, topology) / (topology.ranks * TOKENS)


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "topology", [Topology(2, 8, 1), Topology(4, 8, 1), Topology(8, 8, 1), Topology(16, 4, 1)]
)
def test_crossing_bytes_are_those_of_the_engine(topology: Topology, name: str, phase: Phase) -> None:
    for balance, scattered in (("none", False), ("known", True)):
        planned = crossing_bytes(Deployment(V3, A2, topology, exchange=name, balance=balance), phase)  # type: ignore[arg-type]
        assert planned == pytest.approx(counted(topology, name, phase, scattered), rel=0.04)


def test_the_announced_saving() -> None:
    """Of 64 cards: 200.8 KB a token and layer, flat; half in two tiers, 63% less with INT8, 75% less both ways."""

    def both(name: str) -> float:
        d = Deployment(V3, A2, Topology(8, 8, 8), exchange=name, balance="none")
        return crossing_bytes(d, "dispatch") + crossing_bytes(d, "combine")

    flat = both("flat")
    assert flat == pytest.approx(200_800, rel=0.01)
    assert 1 - both("two_tier") / flat == pytest.approx(0.50, abs=0.02)
    assert 1 - both("two_tier_int8") / flat == pytest.approx(0.63, abs=0.02)
    assert 1 - both("two_tier_int8_both") / flat == pytest.approx(0.75, abs=0.02)


def test_a_row_is_copied_to_no_more_ranks_than_there_are() -> None:
    found = copies(Deployment(V3, A2, Topology(1, 2, 1)))
    assert found.across == 0 and found.node == pytest.approx(1, abs=0.01)


def predicted(row: dict[str, str]) -> float:
    this, ranks, bulk = card(row["card"]), int(row["ep"]), row["mode"] == "normal"
    near, rows = min(ranks, this.domain_ranks), float(row["tokens"])
    phase: Phase = "dispatch" if row["phase"] == "dispatch" else "combine"
    d = Deployment(V3, this, Topology(ranks // near, near, 1), exchange="two_tier" if bulk else "flat",
                   dispatch=row["dispatch_format"], balance="none")  # fmt: skip
    part = exchange(Rates(this, parameters()), d, rows, phase, bulk, 1.0)
    return bandwidth(d, part.seconds, rows, phase) if bulk else part.seconds * 1e6


def test_published_exchanges() -> None:
    rows = list(csv.DictReader(PUBLISHED.read_text().splitlines()))
    errors = {key: abs(predicted(row) / float(row["value"]) - 1) for key, row in enumerate(rows)}
    low = [errors[key] for key, row in enumerate(rows) if row["mode"] == "low latency"]
    assert max(low) < 0.15 and mean(errors.values()) < 0.10 and max(errors.values()) < 0.35
