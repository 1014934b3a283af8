"""Claims about rows: what crosses nodes, and how even cards are."""

from dataclasses import replace

import numpy as np

from expertmesh.mesh.balance import balance, even_cards, split_cards
from expertmesh.mesh.loads import Floats
from expertmesh.mesh.locality import Gate
from expertmesh.mesh.placement import Ints, Placement
from expertmesh.mesh.split import level
from expertmesh.mesh.synthetic import CHOICES, synthetic
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import algorithm, traffic
from expertmesh.planner.memory import static_memory
from expertmesh.planner.news.claims import Claim, Finding
from expertmesh.planner.news.setting import CARDS, MANY, STEP_TOKENS, TP, News, change

ROWS = 64  # of each card, whose traffic is counted
LAYERS, STEPS = 4, 20  # of synthetic loads; single steps


def crossing(news: News) -> Claim:
    m, topology = news.model, Topology(MANY, CARDS, TP)
    every = np.ones(m.n_routed_experts)
    tokens_TK = Gate.of(m.n_routed_experts, m.n_group).sample(every, topology.ranks * ROWS)
    orders = {
        "groups of experts stay on their nodes": np.arange(m.n_routed_experts),
        "experts are anywhere": np.random.default_rng(0).permutation(m.n_routed_experts),
    }
    hows = {
        "two_tier": "two tiers in BF16",
        "two_tier_int8": "two tiers, dispatch in INT8",
        "two_tier_int8_both": "two tiers, dispatch and combine in INT8",
    }

    def kilobytes(name: str, slots_E: Ints) -> float:
        """Of a token and layer."""
        slots_RTK = slots_E[tokens_TK].reshape(topology.ranks, ROWS, -1)
        per_rank = m.n_routed_experts // topology.ranks
        sent = traffic(list(slots_RTK), topology, per_rank, m.hidden_size, "bfloat16", algorithm(name))
        across = sent.across("dispatch", topology) + sent.across("combine", topology)
        return across / len(tokens_TK) / 1e3

    findings, figures = [], {}
    for where, slots_E in orders.items():
        flat = kilobytes("flat", slots_E)
        figures[f"KB a token and layer, flat, {where}"] = flat
        for name, text in hows.items():
            figures[f"KB a token and layer, {name}, {where}"] = sent = kilobytes(name, slots_E)
            findings.append(Finding(change(flat, sent), f"{text}, {where}"))
    return Claim(
        "bytes between nodes", "change", -0.6, tuple(findings), figures,
        f"{MANY} nodes, {ROWS} rows a card, all experts as likely; a token uses {m.topk_group} of {m.n_group} groups",
    )  # fmt: skip


def evenness(news: News) -> Claim:
    topology, redundant = Topology(MANY, CARDS, TP), MANY * CARDS
    loads = synthetic(LAYERS)
    plain, more = (balance(loads["first"], topology, r, objective="known") for r in (0, redundant))
    seen, later, other = (loads[name].total_of(more.layers) for name in ("first", "same", "neighbour"))
    spare, by_step = f"{redundant} redundant slots", "rows split over replicas by each step's own counts"
    step = f"a step of {STEP_TOKENS} tokens a card"
    with_slots = replace(news.layout(MANY), redundant=redundant)
    slot_gb = (static_memory(with_slots)["routed"] - static_memory(news.layout(MANY))["routed"]) / 1e9
    findings = (
        Finding(
            _spread(even_cards(plain, seen)),
            "it is over the window planned for, no redundant slots",
        ),
        Finding(_spread(even_cards(more, seen)), f"it is over the window planned for, {spare}"),
        Finding(_spread(even_cards(more, later)), f"it is over the next window, {spare}"),
        Finding(_spread(even_cards(more, other)), f"it is over another workload, {spare}"),
        Finding(_spread(split_cards(more, other)), f"it is over another workload, {spare}, {by_step}"),
        Finding(_step_spread(more, later, topology, False), f"it is in {step}, {spare}"),
        Finding(_step_spread(more, later, topology, True), f"it is in {step}, {spare}, {by_step}"),
    )
    return Claim(
        "imbalance of cards", "limit", 0.1, findings, {f"GB a card that {spare} take": slot_gb},
        f"the fullest card's rows over the mean, less 1, the mean of {LAYERS} layers; synthetic loads, experts by a "
        "power law",
    )  # fmt: skip


def _spread(cards_LR: Floats) -> float:
    return float((cards_LR.max(-1) / cards_LR.mean(-1)).mean()) - 1


def _step_spread(placement: Placement, counts_LE: Floats, topology: Topology, split: bool) -> float:
    """Of single steps: rows that these loads are shares of, with the noise of their number."""
    rng, rows = np.random.default_rng(0), STEP_TOKENS * topology.ranks * CHOICES
    steps_NLE = np.stack(
        [rng.multinomial(rows, counts / counts.sum(), STEPS) for counts in counts_LE], axis=1
    ).astype(np.float64)
    if not split:
        return _spread(np.stack([even_cards(placement, step) for step in steps_NLE]))
    slots = placement.slots_LRS
    return _spread(np.stack([level(slots[i], steps_NLE[:, i]) for i in range(len(slots))]))
