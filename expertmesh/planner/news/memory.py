"""Claims about memory: what is static, what is left, and how many tokens an expert gets."""

from collections import Counter
from collections.abc import Sequence

from expertmesh.config import ModelConfig
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.memory import cache_bytes, room, static_memory
from expertmesh.planner.news.claims import Claim, Finding
from expertmesh.planner.news.setting import FEW, MANY, STEP_TOKENS, News, change
from expertmesh.weights import describe


def routed(news: News) -> Claim:
    few, many = (_static_gb(news.layout(n), "routed") for n in (FEW, MANY))
    return Claim(
        "routed experts' static memory", "change", -0.75, (Finding(change(few, many)),),
        {"GB a card, 16 cards": few, "GB a card, 64 cards": many},
        "as many slots as experts, on all cards alike",
    )  # fmt: skip


def static(news: News) -> Claim:
    layouts = [(16, 16), (8, 16), (1, 16), (8, 64), (1, 64)]
    found = counted_static(news.model, layouts)
    counted = {f"{cards} cards, TP{tp}": b for (tp, cards), b in zip(layouts, found, strict=True)}
    few, many = (_static_gb(news.layout(n)) for n in (FEW, MANY))
    after = counted["64 cards, TP8"]
    figures = {f"GB a card as announced, {name}": bytes_ / 1e9 for name, bytes_ in counted.items()}
    figures |= {
        "GB a card in this engine, 16 cards, TP8": few,
        "GB a card in this engine, 64 cards, TP8": many,
    }
    return Claim(
        "all static memory", "change", -0.75,
        (
            Finding(change(counted["16 cards, TP8"], after), "attention and the shared expert are split over TP8"),
            Finding(change(few, many), "down-projections and the shared expert are whole on each card"),
            Finding(change(counted["16 cards, TP1"], after), "the 16 cards were DP16, attention whole on each"),
        ),
        figures, "W8A8, embedding and head in BF16, no redundant slots, no MTP layer",
    )  # fmt: skip


def density(news: News) -> Claim:
    m, before, after = news.model, news.layout(FEW), news.layout(MANY)
    batch = STEP_TOKENS
    few, many = (batch * d.ranks * m.num_experts_per_tok / m.n_routed_experts for d in (before, after))
    full = [
        news.full(d)[0] * d.topology.groups * m.num_experts_per_tok / m.n_routed_experts
        for d in (before, after)
    ]
    return Claim(
        "tokens of an expert in a step", "factor", 4.0,
        (Finding(many / few), Finding(full[1] / full[0], "the memory is full on both")),
        {f"16 cards, {batch} tokens a card": few, f"64 cards, {batch} tokens a card": many},
        "as many tokens a card",
    )  # fmt: skip


def room_for_cache(news: News) -> Claim:
    few, many = (room(news.layout(n)) / 1e9 for n in (FEW, MANY))
    token = cache_bytes(news.layout(MANY))
    return Claim(
        "room for the cache", "factor", None, (Finding(many / few),),
        {
            "GB a card, 16 cards": few, "GB a card, 64 cards": many, "bytes a token": token,
            "tokens of a TP group, 16 cards": few * 1e9 / token, "tokens of a TP group, 64 cards": many * 1e9 / token,
        },
        "cache in BF16, held by every card of a TP group; drivers, collectives and fragments take 8% of a card",
    )  # fmt: skip


def counted_static(m: ModelConfig, layouts: Sequence[tuple[int, int]]) -> list[float]:
    """Bytes of a card as the announcement counts them, in W8A8, for each (TP, cards): all of attention, shared experts
    and dense layers divided by TP, embedding and head in BF16; norms, routers, scales and the MTP layer left out."""
    numbers: Counter[str] = Counter()
    for w in describe(m):
        if not w.name.endswith("_scale_inv") and (w.layer or 0) < m.num_hidden_layers:
            numbers[w.kind] += w.numel
    split = numbers["attention"] + numbers["shared"] + numbers["dense"] + 2 * numbers["embedding"]
    return [split / tp + numbers["routed"] / cards for tp, cards in layouts]


def _static_gb(d: Deployment, kind: str | None = None) -> float:
    found = static_memory(d)
    return (sum(found.values()) if kind is None else found[kind]) / 1e9
