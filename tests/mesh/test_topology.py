"""Numbering of ranks."""

import pytest

from expertmesh import InputError, Topology


def test_ranks_are_numbered_node_by_node() -> None:
    topology = Topology(nodes=3, cards_per_node=4, attention_tp=2)
    assert topology.ranks == 12
    assert [topology.node_of(rank) for rank in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert [topology.tp_rank(rank) for rank in range(12)] == [0, 1] * 6


def test_one_rank_is_the_default() -> None:
    assert Topology() == Topology(1, 1, None) and Topology().ranks == 1


@pytest.mark.parametrize("name", ["nodes", "cards_per_node", "attention_tp"])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        Topology(**{name: value})


def test_a_tp_group_stays_inside_a_node() -> None:
    with pytest.raises(InputError, match="attention_tp 3 does not divide the 4 cards"):
        Topology(nodes=3, cards_per_node=4, attention_tp=3)
