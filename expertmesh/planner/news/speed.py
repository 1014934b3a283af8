"""Claims about speed: throughput, time of a token, both at once, the exchange, and what the cluster gains by what."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from expertmesh.planner.costs import decode_step, prefill_step
from expertmesh.planner.deployment import Decode, Deployment, Prefill
from expertmesh.planner.memory import cache_bytes, most_requests, room, workspace_bytes
from expertmesh.planner.news.claims import Claim, Finding
from expertmesh.planner.news.setting import FEW, IMBALANCE, MANY, MEASURES, TP, News, change
from expertmesh.planner.serving import CHUNK, Service, serve

ANNOUNCED_THROUGHPUT, ANNOUNCED_LATENCY = 3.2, -0.5
BATCHES = 64  # that the best joint point is sought among


def throughput(news: News) -> Claim:
    findings = []
    for text, (before, after) in news.pairs().items():
        few, many = news.full_rate(before), news.full_rate(after)
        findings.append(Finding(many / few, text))
    figures = {
        "tokens/s a card, 16 cards, flat and in order": few,
        "tokens/s a card, 64 cards, two tiers and balanced": many,
    }
    kept = _workspace(news, before, after, ANNOUNCED_THROUGHPUT)
    if kept is not None:
        gain = news.full_rate(after, kept) / news.full_rate(before, kept)
        gb = workspace_bytes(before, kept) / 1e9
        findings.append(Finding(gain, f"{text}, and steps keep {gb:.1f} GB of every card as workspace"))
    return Claim(
        "throughput of a card, memory full", "factor", ANNOUNCED_THROUGHPUT, tuple(findings), figures,
        f"decoding; {MEASURES}; {news.lengths}",
    )  # fmt: skip


def _workspace(news: News, before: Deployment, after: Deployment, gain: float) -> float | None:
    """The fewest rows of a card's largest step for which memory is kept such that throughput gains so much, for the
    less is left on 16 cards, the more 64 gain; None where none do."""
    request = news.work.context * cache_bytes(before)  # there is room for one on 16 cards
    low, high = 0.0, (room(before, 0) - request) / workspace_bytes(before, 1)

    def gained(rows: float) -> bool:
        return news.full_rate(after, rows) / news.full_rate(before, rows) >= gain

    if not gained(high):
        return None
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if gained(middle) else (middle, high)
    return high


def latency(news: News) -> Claim:
    findings = []
    for text, (before, after) in news.pairs().items():
        batch = news.full(before)[0]
        few = news.step(before, batch).seconds
        for load, share in (("a card", 1.0), ("in all", FEW / MANY)):
            many = news.step(after, batch * share).seconds
            findings.append(Finding(change(few, many), f"as many requests {load}, {text}"))
    return Claim(
        "time of a token at equal load", "change", ANNOUNCED_LATENCY, tuple(findings),
        {"ms on 16 cards": few * 1e3, "requests of a TP group there": batch},
        f"16 cards with their memory full; {MEASURES}; {news.lengths}",
    )  # fmt: skip


def joint(news: News) -> Claim:
    """Throughput where the time of a token is half of that on 16 cards; and the point that comes nearest to both."""
    before = news.layout(FEW)
    batch, step = news.full(before)
    rate, half = news.full_rate(before), 1 + ANNOUNCED_LATENCY
    findings: list[Finding] = []
    figures: dict[str, float] = {}
    nearest: dict[int, tuple[float, float]] = {}

    def both(point: tuple[float, float]) -> float:
        """Of what was announced, that of the two which is less."""
        gain, time = point
        return min(gain / ANNOUNCED_THROUGHPUT, half / time)

    for tp in (TP, 4, 2, 1):
        after = news.announced(tp)
        points = []
        for b in np.linspace(0, news.full(after)[0], BATCHES + 1)[1:].tolist():
            seconds = news.step(after, b).seconds
            points.append((b / seconds / tp / rate, seconds / step.seconds))
        if halved := [gain for gain, time in points if time <= half]:
            findings.append(Finding(max(halved), f"attention is TP{tp}"))
        gain, time = nearest[tp] = max(points, key=both)
        figures |= {
            f"TP{tp}, nearest to both: throughput, times": gain,
            f"TP{tp}, nearest to both: time of a token, %": (time - 1) * 100,
        }
    tp = max(nearest, key=lambda tp: both(nearest[tp]))
    gain, time = nearest[tp]
    return Claim(
        "throughput with half the time of a token", "factor", ANNOUNCED_THROUGHPUT, tuple(findings), figures,
        f"against 16 cards without measures, {batch:.0f} requests in a TP group; {MEASURES}; {news.lengths}",
        nearest=f"attention is TP{tp}, x{gain:.2f} with {(time - 1) * 100:+.1f}% of the time of a token",
    )  # fmt: skip


def exchange(news: News) -> Claim:
    def seconds(d: Deployment, load: Decode | Prefill) -> float:
        step = decode_step(d, load, news.p) if isinstance(load, Decode) else prefill_step(d, load, news.p)
        return step.by_part["dispatch"] + step.by_part["combine"]

    loads: dict[str, Decode | Prefill] = {
        "decoding, memory full": Decode(
            most_requests(news.layout(MANY), news.work.context), news.work.context
        ),
        "decoding with 128 rows a card": Decode(128.0 * TP, news.work.context),
        "prefill in full steps": Prefill(CHUNK, news.work.input),
    }
    hows = {"two_tier_int8": "dispatch in INT8", "two_tier_int8_both": "dispatch and combine in INT8"}
    found = [
        Finding(
            seconds(news.layout(MANY, balanced=True), load) / seconds(news.layout(MANY, how, balanced=True), load)
            - 1,
            f"it is {when}, {text}",
        )
        for when, load in loads.items()
        for how, text in hows.items()
    ]  # fmt: skip
    return Claim(
        "efficiency of the exchange", "change", 0.4, tuple(found), {},
        f"time of a flat exchange in BF16 over that of two tiers, on 64 cards, imbalance {IMBALANCE} with both",
    )  # fmt: skip


def cluster(news: News) -> Claim:
    """Of 64 cards: flat and in order against balance, two tiers, overlap, and all of them."""
    start = news.layout(MANY)
    balanced = news.layout(MANY, balanced=True)
    parts = {
        "balance": balanced,
        "two tiers": replace(start, exchange="two_tier_int8"),
        "overlap": replace(start, overlap=True),
    }
    every = replace(balanced, exchange="two_tier_int8")
    rates: dict[str, Callable[[Deployment], float]] = {
        "decoding, memory full": news.full_rate,
        "prefill in full steps": news.prefill_rate,
        "both on the same cards, memory full": lambda d: _served(news, d),
    }
    findings: list[Finding] = []
    figures: dict[str, float] = {}
    for when, rate in rates.items():
        base = rate(start)
        overlapped, alone = rate(replace(every, overlap=True)), rate(every)
        findings.append(Finding(change(base, max(overlapped, alone)), f"it is {when}"))
        figures |= {f"{when}: {name} alone, %": change(base, rate(d)) * 100 for name, d in parts.items()}
        figures |= {
            f"{when}: balance and two tiers, %": change(base, alone) * 100,
            f"{when}: all three, %": change(base, overlapped) * 100,
        }
    return Claim(
        "throughput of the cluster", "change", 0.3, tuple(findings), figures,
        "against a flat exchange and experts in order on the same 64 cards; two tiers with dispatch in INT8, "
        f"imbalance {IMBALANCE}, overlap where it gains; {news.lengths}",
    )  # fmt: skip


def _served(news: News, d: Deployment) -> float:
    requests = most_requests(d, news.work.context) * d.topology.groups
    return serve(Service(d), news.work, requests, news.p).tokens
