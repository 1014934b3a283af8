"""`bench_rebalance`: every way gets the same rows, and throughput is against the first."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from expertmesh import InputError, Topology
from expertmesh.bench import rebalance
from expertmesh.bench.rebalance import DOMAINS, PHASES, Model, Traffic, bench_rebalance
from expertmesh.mesh.placement import Ints

EXPERTS, LAYERS, CHOICES = 16, 2, 2
TINY = Traffic(nodes=2, cards=2, redundant=8, rows=32, steps=6, every=2)
ORDER, EPLB, EVEN, SPLIT, OURS = (
    "in order, no replicas",
    "EPLB of the last window",
    "ExpertMesh, even shares",
    "ExpertMesh, split, no moves",
    "ExpertMesh",
)


def recorded() -> tuple[dict[str, Ints], int]:
    """Each domain prefers experts of its own: those of two cards at most."""
    rng, out = np.random.default_rng(0), {}
    for number, name in enumerate(DOMAINS):
        likely = np.where((np.arange(EXPERTS) - 3 * number) % EXPERTS < 5, 8.0, 1.0)
        chosen = [
            [rng.choice(EXPERTS, CHOICES, replace=False, p=likely / likely.sum()) for _ in range(LAYERS)]
            for _ in range(64)
        ]
        out[name] = np.array(chosen)
    return out, EXPERTS


@pytest.fixture(scope="module", autouse=True)
def _synthetic() -> Iterator[None]:
    with patch.object(rebalance, "recorded", recorded):
        yield


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return bench_rebalance(TINY, Model())


@pytest.fixture
def ways(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {way["name"]: way for way in report["ways"]}


def test_all_ways_are_there(report: dict[str, Any], ways: dict[str, dict[str, Any]]) -> None:
    assert list(ways) == [ORDER, EPLB, EVEN, SPLIT, OURS]
    assert (report["steps"], report["layers"]) == (len(PHASES) * TINY.steps, LAYERS)
    assert report["rows_per_card"] == TINY.rows
    assert ways[ORDER]["throughput"] == 1 and all(way["failures"] == 0 for way in ways.values())
    for way in ways.values():
        assert way["seconds"] == pytest.approx(way["computing"] + way["moving"] + way["counting"])
        assert way["throughput"] == ways[ORDER]["seconds"] / way["seconds"]


def test_what_moves_and_what_is_counted(ways: dict[str, dict[str, Any]]) -> None:
    counting = len(PHASES) * TINY.steps * LAYERS * Model().counts
    for name, moves, counts in (
        (ORDER, False, False), (EPLB, True, False), (EVEN, True, False), (SPLIT, False, True), (OURS, True, True),
    ):  # fmt: skip
        way = ways[name]
        assert (way["moved"] > 0) == (way["moving"] > 0) == moves, name
        assert way["counting"] == pytest.approx(counting if counts else 0), name


def test_rows_are_conserved(ways: dict[str, dict[str, Any]]) -> None:
    """The fullest card has the mean at least; times of all ways are those of as many rows."""
    rows = len(PHASES) * TINY.steps * LAYERS * TINY.rows * CHOICES  # of the mean card
    for way in ways.values():
        assert way["max_over_mean"] >= 1
        # A split rounds each card up to whole rows, and so may the mean by one at most.
        mean = way["computing"] / way["max_over_mean"] / Model().row
        assert rows - 1e-6 <= mean <= rows + len(PHASES) * TINY.steps * LAYERS
    for level, other in ((SPLIT, ORDER), (OURS, EVEN), (OURS, SPLIT)):
        assert ways[level]["max_over_mean"] <= ways[other]["max_over_mean"] + 1e-9


def test_a_run_repeats_itself(report: dict[str, Any]) -> None:
    again = bench_rebalance(TINY, Model())
    for first, second in zip(report["ways"], again["ways"], strict=True):
        assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0}


def test_replicas_that_eplb_cannot_place_are_refused() -> None:
    with pytest.raises(InputError, match="EPLB needs 16 experts and the redundant slots to divide by 4"):
        bench_rebalance(Traffic(nodes=2, cards=2, redundant=5, steps=1), Model())


def test_eplb_serves_by_its_plan(ways: dict[str, dict[str, Any]]) -> None:
    """Better than the same replicas where they were at first."""
    tokens, experts = recorded()
    topology = Topology(TINY.nodes, TINY.cards)
    way = rebalance._Way(TINY, Model(), topology, experts, LAYERS)
    for counts_LE in rebalance._steps(TINY, topology.ranks, tokens, experts):
        way.step(counts_LE)
    assert ways[EPLB]["max_over_mean"] < way.report()["max_over_mean"]
