"""What is planned: a model on cards in a layout, and what it has to do in a step."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Literal, TypeAlias

from expertmesh.config import ModelConfig
from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import FORMATS, Algorithm, algorithm
from expertmesh.planner.cards import Card
from expertmesh.planner.formats import CACHES, Weights, weights

Balance: TypeAlias = Literal["none", "known", "perfect"]
BALANCES: tuple[Balance, ...] = ("none", "known", "perfect")
# All rows to all ranks by a gather, sums back by a reduce-scatter: what engines do whose ranks are one TP group.
COLLECTIVE = "collective"


@dataclass(frozen=True)
class Deployment:
    """One instance of an engine. Ranks are cards, or dies of a card that has several.

    topology: its ranks, attention_tp resolved. expert_split: whole experts on ranks ("expert"), or each cut over all
    ranks ("tensor"). redundant: slots of a layer beyond one per expert. weight_precision, cache_precision: names of
    `formats`. exchange: an algorithm of `mesh.traffic`, or "collective"; dispatch, combine: formats of rows in it, None
    for the algorithm's own. drafts: MTP drafts a step; accepted: tokens that a step gives, None for what is usual.
    overlap: a step is two micro-batches of which one computes while the other's rows travel. balance: of experts:
    "none" (in order), "known" (placed by loads), "perfect" (rows forced to be even); imbalance: rows of the fullest
    rank over the mean, where known. InputError where these do not go together.
    """

    model: ModelConfig
    card: Card
    topology: Topology
    expert_split: Literal["expert", "tensor"] = "expert"
    redundant: int = 0
    weight_precision: str = "fp8"
    cache_precision: str = "bf16"
    exchange: str = "two_tier"
    dispatch: str | None = None
    combine: str | None = None
    drafts: int = 0
    accepted: float | None = None
    overlap: bool = False
    balance: Balance = "known"
    imbalance: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", self.topology.resolve(self.model))
        object.__setattr__(self, "weight_precision", weights(self.weight_precision).name)
        if self.exchange != COLLECTIVE:
            algorithm(self.exchange)
        if self.cache_precision not in CACHES:
            raise InputError(f"cache precision {self.cache_precision!r} is not one of {', '.join(CACHES)}")
        if self.expert_split not in ("expert", "tensor"):
            raise InputError(f"expert split {self.expert_split!r} is not one of expert, tensor")
        if self.balance not in BALANCES:
            raise InputError(f"balance {self.balance!r} is not one of {', '.join(BALANCES)}")
        for name in ("dispatch", "combine"):
            if getattr(self, name) not in (None, *FORMATS):
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(FORMATS)}")
        if self.drafts < 0 or self.redundant < 0:
            raise InputError(
                f"{self.drafts} drafts and {self.redundant} redundant slots; both must be at least 0"
            )
        if self.accepted is not None and not 1 <= self.accepted <= self.drafts + 1:
            raise InputError(
                f"{self.accepted} tokens a step with {self.drafts} drafts; it must be from 1 to {self.drafts + 1}"
            )
        if self.imbalance is not None and self.imbalance < 1:
            raise InputError(f"imbalance {self.imbalance} is a maximum over a mean; it must be at least 1")

    @cached_property
    def ranks(self) -> int:
        return self.topology.ranks

    @cached_property
    def weights(self) -> Weights:
        return weights(self.weight_precision)

    @cached_property
    def how(self) -> Algorithm:
        """The exchange, with the formats that were asked for."""
        own = algorithm("flat" if self.exchange == COLLECTIVE else self.exchange)
        return replace(own, dispatch=self.dispatch or own.dispatch, combine=self.combine or own.combine)

    @cached_property
    def domain(self) -> int:
        """Ranks that reach each other at the speed of a node: the node's, or a rack's where it is one plane."""
        wide = self.card.domain_ranks > self.card.ranks_per_node
        near = self.card.domain_ranks if wide else min(self.card.domain_ranks, self.topology.cards_per_node)
        return min(near, self.ranks)

    @cached_property
    def domains(self) -> int:
        """Nodes as the exchange sees them."""
        return ceil(self.ranks / self.domain)

    @cached_property
    def slots(self) -> int:
        """Slots of routed experts of a rank in each layer; of split experts, as many as take the same memory."""
        return ceil((self.model.n_routed_experts + self.redundant) / self.ranks)


@dataclass(frozen=True)
class Decode:
    """A step of decoding. batch: requests of each TP group, the mean; context: tokens of a request in the cache."""

    batch: float
    context: float

    def __post_init__(self) -> None:
        if not self.batch > 0 or not self.context >= 0:
            raise InputError(
                f"a step of {self.batch} requests with {self.context} tokens each; give numbers above 0"
            )


@dataclass(frozen=True)
class Prefill:
    """A step of prefill. tokens: of prompts, computed by each TP group divided by its ranks; length: of a prompt;
    cached: how many of these are in the cache already."""

    tokens: float
    length: float
    cached: float = 0.0

    def __post_init__(self) -> None:
        if not self.tokens > 0 or not self.length > self.cached >= 0:
            raise InputError(
                f"a step of {self.tokens} tokens of prompts of {self.length} with {self.cached} cached; there must be "
                "some, and fewer be cached than a prompt has"
            )


Load: TypeAlias = Decode | Prefill
