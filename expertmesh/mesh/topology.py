"""Nodes, the cards in each, and how attention is split inside a node."""

from dataclasses import dataclass, replace
from math import gcd

from expertmesh.config import ModelConfig
from expertmesh.errors import InputError


@dataclass(frozen=True)
class Topology:
    """A cluster of equal nodes. Ranks are numbered node by node.

    attention_tp: how many cards of a node share the heads of one attention layer (the TP group); the groups of a node
    are data parallel. None: as many as the node and the model allow, which `resolve` works out.
    """

    nodes: int = 1
    cards_per_node: int = 1
    attention_tp: int | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "cards_per_node", "attention_tp"):
            value = getattr(self, name)
            if value is None and name == "attention_tp":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"topology: {name} is {value!r}, but must be a whole number of at least 1")
        if self.attention_tp is not None and self.cards_per_node % self.attention_tp:
            raise InputError(
                f"topology: attention_tp {self.attention_tp} does not divide the {self.cards_per_node} cards of a node"
            )

    def resolve(self, model: ModelConfig) -> "Topology":
        """With attention_tp worked out. InputError where the model cannot be split as it was asked for."""
        axes = _split_axes(model)
        if self.attention_tp is None:
            return replace(self, attention_tp=gcd(self.cards_per_node, *axes.values()))
        odd = [f"{name} {size}" for name, size in axes.items() if size % self.attention_tp]
        if odd:
            raise InputError(f"topology: attention_tp {self.attention_tp} does not divide {', '.join(odd)}")
        return self

    @property
    def ranks(self) -> int:
        return self.nodes * self.cards_per_node

    @property
    def tp(self) -> int:
        """Size of a TP group, once resolved."""
        return self.attention_tp or 1

    @property
    def groups(self) -> int:
        """Number of TP groups: each holds requests and a latent cache of its own."""
        return self.ranks // self.tp

    def node_of(self, rank: int) -> int:
        return rank // self.cards_per_node

    def card_of(self, rank: int) -> int:
        """The rank's place in its node."""
        return rank % self.cards_per_node

    def group_of(self, rank: int) -> int:
        """Number of the rank's TP group."""
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        """The rank's place in its TP group."""
        return rank % self.tp

    def all_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.ranks))

    def tp_ranks(self, rank: int) -> tuple[int, ...]:
        """The rank's TP group."""
        first = rank - self.tp_rank(rank)
        return tuple(range(first, first + self.tp))

    def node_ranks(self, rank: int) -> tuple[int, ...]:
        """All cards of the rank's node."""
        first = rank - self.card_of(rank)
        return tuple(range(first, first + self.cards_per_node))

    def rail_ranks(self, rank: int) -> tuple[int, ...]:
        """The cards of all nodes with the rank's place in its own: what crosses nodes stays on its rail, so that
        all links of a node carry their share."""
        return tuple(range(self.card_of(rank), self.ranks, self.cards_per_node))


def _split_axes(model: ModelConfig) -> dict[str, int]:
    """What a TP group splits."""
    axes = {"num_attention_heads": model.num_attention_heads, "vocab_size": model.vocab_size}
    if len(model.moe_layers) < model.num_hidden_layers:
        axes["intermediate_size"] = model.intermediate_size
    return axes
