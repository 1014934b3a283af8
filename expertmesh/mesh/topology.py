"""Nodes, the cards in each, and how attention is split inside a node."""

from dataclasses import dataclass

from expertmesh.errors import InputError


@dataclass(frozen=True)
class Topology:
    """A cluster of equal nodes. Ranks are numbered node by node.

    attention_tp: how many cards of a node share the heads of one attention layer (the TP group); the cards of a
    node that are left over from it are data parallel.
    """

    nodes: int = 1
    cards_per_node: int = 1
    attention_tp: int = 1

    def __post_init__(self) -> None:
        for name in ("nodes", "cards_per_node", "attention_tp"):
            if getattr(self, name) < 1:
                raise InputError(f"topology: {name} is {getattr(self, name)}, but must be at least 1")
        if self.cards_per_node % self.attention_tp:
            raise InputError(
                f"topology: attention_tp {self.attention_tp} does not divide the {self.cards_per_node} cards of a node"
            )

    @property
    def ranks(self) -> int:
        return self.nodes * self.cards_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.cards_per_node

    def tp_rank(self, rank: int) -> int:
        """The rank's place in its TP group."""
        return rank % self.attention_tp
