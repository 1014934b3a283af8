"""What a search may choose from: layouts of a cluster, formats that its cards compute well, and what was pinned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal, TypeAlias

from expertmesh.config import ModelConfig
from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import FORMATS, algorithm
from expertmesh.planner.cards import Card
from expertmesh.planner.deployment import COLLECTIVE, Balance, Deployment
from expertmesh.planner.formats import CACHES, weights

MOST_CARDS = 16_384
MOST_RANKS = 1024  # of an instance
MOST_DRAFTS = 3
SPARE = (0, 1, 2)  # slots of a rank and layer beyond those that all experts need
# Where prompts are prefilled: on the ranks that decode, on nodes of the cluster for that alone, or not planned at all.
Mode: TypeAlias = Literal["together", "apart", "elsewhere"]
MODES: tuple[Mode, ...] = ("together", "apart", "elsewhere")
Way: TypeAlias = tuple[str, str | None, str | None]  # exchange, format of dispatch and of combine


@dataclass(frozen=True)
class Cluster:
    """cards: of each node."""

    card: Card
    nodes: int
    cards: int

    def __post_init__(self) -> None:
        if not (1 <= self.nodes <= MOST_CARDS and 1 <= self.cards <= MOST_CARDS and self.total <= MOST_CARDS):
            raise InputError(
                f"{self.nodes} nodes of {self.cards} cards; give at least 1 of each, and {MOST_CARDS} cards at most"
            )

    @property
    def total(self) -> int:
        return self.nodes * self.cards

    @property
    def ranks_per_node(self) -> int:
        return self.cards * self.card.dies_per_card

    def sizes(self) -> list[Topology]:
        """Of an instance: some nodes, or a share of one."""
        inside = [Topology(1, n) for n in divisors(self.ranks_per_node)[:-1]]
        most = max(1, min(self.nodes, MOST_RANKS // self.ranks_per_node))
        # All up to 8 nodes; of more, steps of an eighth, and all nodes together.
        some = [
            n for n in range(1, most + 1) if n % (1 << max(0, n.bit_length() - 4)) == 0 or n == self.nodes
        ]
        return inside + [Topology(n, self.ranks_per_node) for n in some]

    def instances(self, size: Topology, nodes: int) -> int:
        """How many of this size so many nodes are, 0 where they do not divide."""
        ranks = nodes * self.ranks_per_node
        return ranks // size.ranks if nodes % size.nodes == 0 and ranks % size.ranks == 0 else 0


@dataclass(frozen=True)
class Space:
    """Choices of each dimension; None: all that make sense for the card and the model. dispatch, combine: formats of
    rows in the exchange. accepted: tokens that a step gives for a request, None for what is usual. InputError for a
    choice that cannot be."""

    cluster: Cluster
    model: ModelConfig
    attention_tp: int | None = None
    redundant: int | None = None
    weights: str | None = None
    cache: str | None = None
    exchange: str | None = None
    dispatch: str | None = None
    combine: str | None = None
    drafts: int | None = None
    accepted: float | None = None
    overlap: bool | None = None
    mode: Mode | None = None
    balance: Balance = "known"

    def __post_init__(self) -> None:
        card = self.cluster.card
        object.__setattr__(self, "weights", weights(self.weights or best_weights(card, self.model)).name)
        object.__setattr__(self, "cache", self.cache or byte_format(card))
        if self.cache not in CACHES:
            raise InputError(f"cache precision {self.cache!r} is not one of {', '.join(CACHES)}")
        for name in ("dispatch", "combine"):
            if getattr(self, name) not in (None, *FORMATS):
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(FORMATS)}")
        if self.exchange not in (None, COLLECTIVE):
            algorithm(str(self.exchange))
        if self.attention_tp is not None:  # says what it does not divide
            Topology(1, self.cluster.ranks_per_node, self.attention_tp).resolve(self.model)
        if self.drafts is not None and not 0 <= self.drafts <= MOST_DRAFTS:
            raise InputError(f"{self.drafts} drafts; plan for 0 to {MOST_DRAFTS}")
        if self.drafts and not self.model.num_nextn_predict_layers:
            raise InputError(f"drafts are {self.drafts}, but the model has no layer for them; plan for 0")
        if self.accepted is not None and (self.drafts is None or not 1 <= self.accepted <= self.drafts + 1):
            raise InputError(
                f"{self.accepted} tokens a step: say with how many drafts, and a number from 1 to one more than these"
            )
        most = self.model.n_routed_experts * (self.cluster.total - 1)
        if self.redundant is not None and not 0 <= self.redundant <= max(0, most):
            raise InputError(f"{self.redundant} redundant slots; give a number from 0 to {max(0, most)}")

    @property
    def ways(self) -> tuple[Way, ...]:
        """Ways of an exchange. Rows of fewer bytes are never slower, and 8 bits are the fewest: where formats are open
        they are what is chosen, and ways that differ in them alone are not listed."""
        if self.exchange is not None:
            return ((self.exchange, self.dispatch, self.combine),)
        small = byte_format(self.cluster.card)
        there, back = self.dispatch or small, self.combine or small
        return ((COLLECTIVE, None, None), ("flat", there, back), ("two_tier", there, back))

    def tps(self, size: Topology) -> list[int]:
        """Sizes of a TP group that divide a node, and the model."""
        some = [self.attention_tp] if self.attention_tp else divisors(size.cards_per_node)
        return [tp for tp in some if _splits(self.model, size.cards_per_node, tp)]

    def layouts(self, size: Topology, tp: int, prefill: bool = False) -> Iterator[Deployment]:
        """All instances of this size that decode, or that prefill only. What is likely good comes first."""
        topology = replace(size, attention_tp=tp)
        alone = topology.ranks == 1 or not self.model.moe_layers
        ways = self._ways(topology)[:1] if alone else self._ways(topology)
        overlaps = (False, True) if self.overlap is None else (self.overlap,)
        drafts = range(MOST_DRAFTS + 1) if self.drafts is None else (self.drafts,)
        if prefill or not self.model.num_nextn_predict_layers:
            drafts = (0,)
        first = next(self._base(topology, way, 0) for way in ways[-1:])
        halves = overlaps[:1] if alone else overlaps
        redundants = self._redundant(topology.ranks)
        # Drafts change nothing in prefill: next to each other, they share what is cached of it.
        for way, redundant, halved, extra in product(ways[::-1], redundants, halves, drafts):
            yield replace(
                first, exchange=way[0], dispatch=way[1], combine=way[2], redundant=redundant, drafts=extra,
                overlap=halved, accepted=None if prefill else self.accepted,
            )  # fmt: skip

    def _base(self, topology: Topology, way: Way, drafts: int) -> Deployment:
        return Deployment(
            self.model, self.cluster.card, topology, weight_precision=str(self.weights),
            cache_precision=str(self.cache), exchange=way[0], dispatch=way[1], combine=way[2], drafts=drafts,
            balance=self.balance,
        )  # fmt: skip

    def _ways(self, topology: Topology) -> tuple[Way, ...]:
        """Where nothing crosses, two tiers are one that merges copies, and never worse than one that does not."""
        near = self._base(topology, self.ways[-1], 0).domains == 1
        return tuple(way for way in self.ways if len(self.ways) == 1 or way[0] != "flat" or not near)

    def _redundant(self, ranks: int) -> list[int]:
        if ranks == 1 or not self.model.moe_layers:
            return [0]
        if self.redundant is not None:
            return [self.redundant]
        experts = self.model.n_routed_experts
        full = -experts % ranks  # fills the slots that there are anyway
        return [n for n in (full + spare * ranks for spare in SPARE) if n <= experts * (ranks - 1)]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@lru_cache
def _splits(model: ModelConfig, cards: int, tp: int) -> bool:
    try:
        Topology(1, cards, tp).resolve(model)
    except InputError:
        return False
    return True


def byte_format(card: Card) -> str:
    """The 8-bit numbers that the card has."""
    return "fp8" if card.fp8_tflops else "int8"


def best_weights(card: Card, model: ModelConfig) -> str:
    """As the checkpoint has them where the card multiplies FP8, else W8A8 where it can; 4 bits only when asked for."""
    if card.fp8_tflops and model.fp8_block == (128, 128):
        return "fp8"
    return "int8" if card.int8_tflops else "fp8" if card.fp8_tflops else "bf16"
