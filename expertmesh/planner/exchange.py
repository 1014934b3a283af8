"""The exchange of rows with experts: expected copies and bytes of a rank, by the law of `mesh.traffic`, and time."""

from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma

import numpy as np

from expertmesh.config import ModelConfig
from expertmesh.mesh.placement import Ints
from expertmesh.mesh.traffic import FORMATS, Phase
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.work import Part, Rates

SAMPLED = 4096  # tokens, whose gate is limited to some groups
FILL = 0.15  # of the quicker tier's time, in which the pipeline of the two tiers fills and empties
HEADER = 9  # bytes of a chosen slot beside its row: slot, weight, and its share of a count


@lru_cache
def hit(model: ModelConfig, experts: float, in_order: bool) -> float:
    """Probability that a token uses any of so many experts, if all are as likely.

    in_order: they are neighbours, so that a gate that is limited to some groups may leave them out (DeepSeek-V3,
    section 2.1.2); else they are from anywhere.
    """
    total, chosen = model.n_routed_experts, model.num_experts_per_tok
    if experts >= total:
        return 1.0
    if not in_order or model.n_group == 1 or model.topk_group == model.n_group:
        return 1 - _none(total, experts, chosen)
    parts = np.sort((_tokens(model) / experts).astype(np.int64), axis=1)
    used = 1 + (np.diff(parts, axis=1) > 0).sum(axis=1)
    return float(used.mean() * experts / total)


@lru_cache
def _tokens(model: ModelConfig) -> Ints:
    """Experts [T, K] of tokens whose scores are all alike: groups by the sum of their two best, or by the best."""
    scores_TE = np.random.default_rng(0).random((SAMPLED, model.n_routed_experts))
    groups_TGN = np.sort(scores_TE.reshape(SAMPLED, model.n_group, -1), axis=2)
    best = 2 if model.topk_method == "noaux_tc" else 1
    worst_TG = np.argsort(groups_TGN[:, :, -best:].sum(axis=2), axis=1)[:, : model.n_group - model.topk_group]
    groups_TE = np.arange(model.n_routed_experts) // (model.n_routed_experts // model.n_group)
    scores_TE[(groups_TE[None, :, None] == worst_TG[:, None, :]).any(axis=2)] = -1
    return np.argpartition(-scores_TE, model.num_experts_per_tok, axis=1)[:, : model.num_experts_per_tok]


def _none(total: float, some: float, chosen: int) -> float:
    """Probability that none of `chosen` different ones is among `some` of `total`."""
    rest = total - some
    if rest < chosen:
        return 0.0
    log = lgamma(rest + 1) - lgamma(rest - chosen + 1) - lgamma(total + 1) + lgamma(total - chosen + 1)
    return exp(log)


@dataclass(frozen=True)
class Copies:
    """Of one token: rows that leave its domain, and rows that go to other ranks inside the domain where they arrive or
    start."""

    across: float
    node: float


def copies(deployment: Deployment) -> Copies:
    """Expected copies of a token. Balanced placements scatter experts; else they are in order."""
    d, model = deployment, deployment.model
    ranks, chosen = d.ranks, float(model.num_experts_per_tok)
    far = 1 - d.domain / ranks  # of ranks, those of other domains
    in_order = d.balance == "none"
    per_rank = model.n_routed_experts / ranks
    if len(d.how.hops) == 1:  # flat: a copy for each chosen slot
        return Copies(chosen * far, chosen * (d.domain - 1) / ranks)
    to_domain = hit(model, per_rank * d.domain, in_order)
    to_rank = hit(model, per_rank, in_order)
    across = d.domains * to_domain * far
    # Inside: one copy for each rank with any, but for the rank that the row is on, or came to.
    return Copies(across, ranks * to_rank * (1 - 1 / d.domain))


def row_bytes(deployment: Deployment, phase: Phase) -> tuple[float, float]:
    """Of a row on the first hop and on those after it. What is quantised is so inside a node too where there is one
    hop, or nothing crosses."""
    plain, width = FORMATS["bfloat16"], deployment.model.hidden_size
    asked = deployment.how.dispatch if phase == "dispatch" else deployment.how.combine
    first = FORMATS[asked or plain.name]
    rest = first if phase == "dispatch" else plain
    return tuple(width * f.itemsize + 4.0 * f.scales(width) for f in (first, rest))  # type: ignore[return-value]


def crossing_bytes(deployment: Deployment, phase: Phase) -> float:
    """Bytes of one token and layer that cross nodes."""
    return copies(deployment).across * row_bytes(deployment, phase)[0]


def exchange(
    rates: Rates, deployment: Deployment, rows: float, phase: Phase, bulk: bool, factor: float
) -> Part:
    """One dispatch or combine. rows: of each rank; bulk: of prefill, where ranks tell each other first how many rows
    come; factor: of the fullest rank's rows over the mean."""
    d, card = deployment, rates.card
    if d.ranks == 1 or not d.model.moe_layers:
        return Part(phase, 0.0, 0.0, "latency", travels=True)
    found = copies(d)
    first, rest = row_bytes(d, phase)
    header = HEADER if phase == "dispatch" else 0.0
    hops = len(d.how.hops) if d.domains > 1 else 1
    inside = rest if hops > 1 else first
    start = (card.dispatch_us if phase == "dispatch" else card.combine_us) * (1 + 0.5 * (hops - 1))
    start += card.peer_us * (d.ranks - 1) if bulk else 0.0
    node, across = (
        rows * factor * n * (b + header) for n, b in ((found.node, inside), (found.across, first))
    )
    return rates.travel(phase, start, node, across, FILL if hops > 1 else 0.0, bulk)


def collective(rates: Rates, name: str, ranks: int, domain: int, bytes_: float, bulk: bool = False) -> Part:
    """A gather or reduce-scatter of so many bytes in all over so many ranks. bulk: of prefill."""
    if ranks == 1:
        return Part(name, 0.0, 0.0, "latency", travels=True)
    p = rates.p
    domain = min(domain, ranks)
    crosses = ranks > domain
    start = p.collective_us + (p.collective_across_us if crosses else 0.0)
    node = bytes_ * (domain - 1) / domain
    across = bytes_ * (1 - domain / ranks) / domain if crosses else 0.0
    return rates.travel(name, start, node, across, bulk=bulk)


def bandwidth(deployment: Deployment, seconds: float, rows: float, phase: Phase) -> float:
    """GB/s of a bulk exchange as DeepEP states it: bytes that a rank receives over the slower tier, rows that stay in
    their own node or rank among them."""
    d = deployment
    ranks = d.domain if d.domains > 1 else 1
    in_order = d.balance == "none"
    targets = d.domains if d.domains > 1 else d.ranks
    each = hit(d.model, d.model.n_routed_experts / d.ranks * ranks, in_order)
    return rows * targets * each * row_bytes(d, phase)[0] / seconds / 1e9
