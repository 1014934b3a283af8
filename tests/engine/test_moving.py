"""Weights of experts from rank to rank in portions, whichever way they go."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh import LLM, Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.exchange import TieredExchange
from expertmesh.engine.moving import Mover
from expertmesh.engine.ranks import ThreadRanks, matched
from expertmesh.mesh.migration import rounds
from expertmesh.mesh.placement import EMPTY, Placement
from expertmesh.mesh.traffic import algorithm
from expertmesh.model.moe import MoE
from tests.comm.cards.world import CardWorld
from tests.support.cluster import placements, topologies
from tests.support.worlds import EVERY_WORLD, WORLDS, Worlds

LAYER, WIDTH = 0, 6
BYTES = 4 * (2 * WIDTH + WIDTH)


@dataclass(frozen=True)
class Change:
    topology: Topology
    old: Placement
    new: Placement


@st.composite
def changes(draw: st.DrawFn) -> Change:
    topology, experts = draw(topologies(8)), draw(st.integers(1, 10))
    old, new = draw(placements(topology, experts)), draw(placements(topology, experts))
    size = max(old.slots_per_rank, new.slots_per_rank)

    def filled(p: Placement) -> Placement:
        more = ((0, 0), (0, 0), (0, size - p.slots_per_rank))
        return Placement(np.pad(p.slots_LRS, more, constant_values=EMPTY), experts, (LAYER,))

    return Change(topology, filled(old), filled(new))


def weights_of(expert: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(expert)
    return torch.randn(2, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)


def moe_of(slots: Sequence[int]) -> MoE:
    """As much of it as a mover sees."""
    moe = MoE.__new__(MoE)
    moe.gate_up, moe.down = torch.zeros(len(slots), 2, WIDTH), torch.zeros(len(slots), WIDTH)
    for slot, expert in enumerate(slots):
        if expert != EMPTY:
            moe.gate_up[slot], moe.down[slot] = weights_of(expert)
    return moe


def carry_out(change: Change, portion: int, world: Worlds) -> tuple[Placement, list[MoE]]:
    """The last placement, and what the ranks have of weights then."""
    every = rounds(change.old, change.new, change.topology)

    def program(comm: Comm) -> tuple[MoE, list[list[int | None]]]:
        moe, placement = moe_of(change.old.of_rank(comm.rank)[LAYER]), change.old
        exchange = TieredExchange(comm, placement, algorithm("two_tier"))
        model: Any = SimpleNamespace(layers={LAYER: (None, moe)})
        mover, sums = Mover(model, exchange), []
        for one in every:
            before = moe.gate_up.clone(), moe.down.clone()
            for start in range(0, BYTES, portion):
                mover.stage(one.moves, start, min(BYTES, start + portion))
            sums.append(mover.checksums(one.moves))
            assert torch.equal(before[0], moe.gate_up) and torch.equal(before[1], moe.down)
            assert exchange.placement is placement
            placement = placement.replaced(one.slots)
            mover.commit(one.moves, placement)
            assert exchange.placement is placement
        return moe, sums

    found = world(change.topology).run(program)
    end = change.old
    for number, one in enumerate(every):
        pairs = matched(one.moves, [sums[number] for _, sums in found])
        assert all(given == came for given, came in pairs)
        for rank, (_, sums) in enumerate(found):
            parts = [rank in (m.source, m.rank) for m in one.moves]
            assert [checksum is not None for checksum in sums[number]] == parts
        end = end.replaced(one.slots)
    return end, [moe for moe, _ in found]


@settings(max_examples=60)
@given(changes(), st.sampled_from([5, 7, 48, 50, BYTES, BYTES + 9]), WORLDS | st.just(CardWorld))
def test_every_slot_gets_its_expert(change: Change, portion: int, world: Worlds) -> None:
    """Over rails and inside nodes, in portions that end anywhere."""
    end, moes = carry_out(change, portion, world)
    for rank, moe in enumerate(moes):
        for slot, expert in enumerate(end.slots_LRS[0, rank].tolist()):
            if expert != EMPTY:
                gate_up, down = weights_of(expert)
                assert torch.equal(moe.gate_up[slot], gate_up) and torch.equal(moe.down[slot], down)


@pytest.mark.parametrize("world", [*EVERY_WORLD, CardWorld], ids=["threads", "sockets", "memory", "cards"])
def test_what_crosses_nodes_stays_on_its_rail(world: Worlds) -> None:
    """An expert of rank 1 comes to rank 2 by way of rank 3, and each link carries it once."""
    topology = Topology(2, 2, 1)
    old = Placement(np.array([[[0], [1], [2], [3]]]), 4, (LAYER,))
    new = Placement(np.array([[[0], [2], [1], [3]]]), 4, (LAYER,))
    (one,) = rounds(old, new, topology)

    def program(comm: Comm) -> list[int]:
        exchange = TieredExchange(comm, old, algorithm("two_tier"))
        model: Any = SimpleNamespace(layers={LAYER: (None, moe_of(old.of_rank(comm.rank)[LAYER]))})
        Mover(model, exchange).stage(one.moves, 0, BYTES)
        return comm.sent.bytes["weights"].tolist()

    sent = world(topology).run(program)
    assert sent == [[0, BYTES, 0, 0], [0, 0, 0, BYTES], [BYTES, 0, 0, 0], [0, 0, BYTES, 0]]


def test_ranks_share_no_experts_that_may_move(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two of them begin with the same: here with nothing."""

    def memory(rebalance: str) -> list[int]:
        with LLM(tiny_folder, topology=Topology(1, 12, 1), rebalance=rebalance) as llm:
            ranks = llm.engine.ranks
            assert isinstance(ranks, ThreadRanks)
            moes: list[Any] = [layer for r in ranks.runners for _, layer in r.model.layers]
            return [id(moe.gate_up) for moe in moes if isinstance(moe, MoE)]

    own, shared = memory("auto"), memory("off")
    assert len(set(own)) == len(own) and len(set(shared)) < len(shared)
