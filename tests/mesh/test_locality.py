"""Copies of tokens to other nodes, and tokens as a gate would choose them."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import Topology, native
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.locality import ENOUGH, Gate, copies_to_nodes, cross_node_copies, sample
from expertmesh.mesh.placement import EMPTY, Placement, default_placement
from expertmesh.mesh.search import arrange
from expertmesh.mesh.split import Split
from tests.support.cluster import placements, topologies


@given(topologies(), st.integers(1, 16), st.sampled_from([0.0, 0.2]), st.integers(0, 2**32), st.data())
def test_copies_are_counted(
    topology: Topology, experts: int, tolerance: float, seed: int, data: st.DataObject
) -> None:
    slots_RS = data.draw(placements(topology, experts)).slots_LRS[0]
    split, rng = Split(slots_RS, experts, topology), np.random.default_rng(seed)
    chosen = data.draw(st.integers(1, min(experts, 4)))
    experts_RTK = np.argsort(rng.random((topology.ranks, 5, experts)), axis=2)[:, :, :chosen]
    wishes = [split.wish(e, rank) for rank, e in enumerate(experts_RTK)]
    counts = np.stack([wish.counts_2P for wish in wishes])
    copies = 0
    for rank, wish in enumerate(wishes):
        for slots in split.assign(wish, rank, *split.settle(counts, rank, tolerance)).tolist():
            nodes = {topology.node_of(slot // slots_RS.shape[1]) for slot in slots}
            copies += len(nodes - {topology.node_of(rank)})
    assert copies_to_nodes(split, experts_RTK, tolerance) == pytest.approx(copies / (5 * topology.ranks))


@pytest.mark.parametrize(("nodes", "copies"), [(1, 0.0), (2, 0.5), (4, 0.75)])
def test_copies_of_tokens_with_one_expert(nodes: int, copies: float) -> None:
    """Every rank asks for every expert: those of the other nodes are sent there."""
    topology = Topology(nodes, 2)
    split = Split(default_placement(8, [0], topology).slots_LRS[0], 8, topology)
    experts_RTK = np.tile(np.arange(8)[:, None], (topology.ranks, 1, 1))
    assert copies_to_nodes(split, experts_RTK) == copies


def test_more_room_for_wishes_is_fewer_copies() -> None:
    topology, rng = Topology(4, 2), np.random.default_rng(0)
    experts_E = np.arange(32)
    ranks = [(experts_E % 8 == r) | ((experts_E + 3) % 8 == r) for r in range(8)]  # replicas on two nodes
    placement = Placement(np.stack([experts_E[here] for here in ranks])[None], 32, (0,))
    loads = Loads.of(rng.zipf(1.6, (1, 32)).clip(1, 200))
    exact, loose = (cross_node_copies(placement, loads, topology, tolerance) for tolerance in (0.0, 9.0))
    assert loose < exact
    assert cross_node_copies(default_placement(32, [0], Topology(1, 8), 32), loads, Topology(1, 8)) == 0


@settings(max_examples=40)
@given(st.sampled_from([(1, 1), (4, 2), (8, 4), (2, 2)]), st.integers(1, 8), st.integers(0, 2**32))
def test_a_gate_chooses_in_its_groups(groups: tuple[int, int], chosen: int, seed: int) -> None:
    gate = Gate(groups[0], groups[1], chosen)
    shares_E = np.random.default_rng(seed).lognormal(0, 1, 32)
    tokens_TK = gate.sample(shares_E, 100, seed)
    assert tokens_TK.shape == (100, chosen) and tokens_TK.min() >= 0 and tokens_TK.max() < 32
    for token in tokens_TK.tolist():
        assert len(set(token)) == chosen
        assert len({expert // (32 // gate.groups) for expert in token}) <= gate.top_groups
    np.testing.assert_array_equal(tokens_TK, gate.sample(shares_E, 100, seed))


@pytest.mark.parametrize("gate", [Gate(1, 1, 8), Gate(8, 4, 8), Gate(8, 4, 2)])
def test_a_gate_gives_the_shares(gate: Gate) -> None:
    shares_E = np.random.default_rng(3).lognormal(0, 0.6, 64)
    shares_E /= shares_E.sum()
    drawn = np.bincount(gate.sample(shares_E, 4096).ravel(), minlength=64) / (4096 * gate.chosen)
    # No token chooses an expert twice, so none has more than one in `chosen`.
    wanted = np.minimum(shares_E, 1 / gate.chosen)
    assert np.abs(drawn - wanted).sum() < 0.1


def test_gates_of_models() -> None:
    assert Gate.of(256) == Gate(8, 4, 8) and Gate.of(256, 1) == Gate(1, 1, 8)
    assert Gate.of(64) == Gate(1, 1, 8) and Gate.of(6) == Gate(1, 1, 6)
    assert Gate.of(8, 8) == Gate(8, 4, 4)


def test_a_gate_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda name: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    tokens_TK = Gate(8, 4, 3).sample(np.arange(1.0, 17), 50, seed=1)
    assert tokens_TK.shape == (50, 3) and all(len(set(token)) == 3 for token in tokens_TK.tolist())


def test_recorded_tokens_are_taken_where_there_are_enough() -> None:
    rng = np.random.default_rng(0)
    tokens_LTK = np.argsort(rng.random((2, 40, 16)), axis=2)[:, :, :4]
    tokens_LTK[1, ::2, 3] = EMPTY
    loads = Loads.of_tokens(tokens_LTK, 16)
    recorded = {tuple(token) for token in tokens_LTK[0].tolist()}
    assert {tuple(token) for token in sample(loads, 0, 40).tolist()} == recorded
    assert sample(loads, 1, 20).shape == (20, 4) and sample(loads, 1, 21).shape == (21, 8)
    assert (sample(loads, 1, 20) != EMPTY).all()
    many = np.argsort(rng.random((1, ENOUGH, 16)), axis=2)[:, :, :4]
    found = sample(Loads.of_tokens(many, 16), 0, 3 * ENOUGH)
    assert found.shape == (3 * ENOUGH, 4)
    assert {tuple(token) for token in found.tolist()} <= {tuple(token) for token in many[0].tolist()}


def test_nodes_of_cards_that_ask_alike() -> None:
    """Tokens want experts 0 to 3 together, or 4 to 7; these are on cards of both nodes at first."""
    slots_RS = np.array([[0, 1], [4, 5], [2, 3], [6, 7]])
    tokens_TK = np.array([[0, 1, 2, 3], [4, 5, 6, 7]] * 50)
    found = arrange(slots_RS, np.full(4, 2), 2, tokens_TK, 0)
    nodes = [set(node.tolist()) for node in found.reshape(2, -1)]
    assert sorted(map(sorted, nodes)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(map(sorted, found.tolist())) == sorted(map(sorted, slots_RS.tolist()))
