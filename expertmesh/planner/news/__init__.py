"""The result that iFlytek and Huawei announced on 11 March 2025 (expert-parallel inference over many nodes of Ascend
cards), replayed: each claim beside what this planner finds, under which assumption."""

from collections.abc import Callable
from dataclasses import replace

from expertmesh.planner.better import Better, best_load, better, precisions
from expertmesh.planner.news.claims import Claim, Finding
from expertmesh.planner.news.memory import density, room_for_cache, routed, static
from expertmesh.planner.news.prologue import prologue
from expertmesh.planner.news.rows import crossing, evenness
from expertmesh.planner.news.setting import MANY, News
from expertmesh.planner.news.speed import cluster, exchange, joint, latency, throughput

__all__ = ["Claim", "Finding", "News", "beaten", "claims"]


STARTS = (0.5, 2.0)  # times the start of an exchange, which of this card is an estimate
TIMED = (throughput, latency, joint, exchange, cluster)  # claims that it may decide


def claims(news: News) -> list[Claim]:
    """All that was announced: memory, speed, network, balance, kernels."""
    rollout = Claim("speed of rollouts of reinforcement learning", "change", 2.0, (), built=False)
    parts = (
        routed, static, density, room_for_cache, throughput, latency, joint, crossing, exchange, evenness, cluster,
        prologue,
    )  # fmt: skip
    return [*(_timed(news, part) if part in TIMED else part(news) for part in parts), rollout]


def _timed(news: News, part: Callable[[News], Claim]) -> Claim:
    """With the verdicts under other starts of an exchange, where these decide."""
    claim = part(news)
    starts = [times * news.start_us for times in STARTS]
    others = {f"{us:.0f} us": part(news.starting(us)) for us in starts}
    if all(claim.agrees(other) for other in others.values()):
        return claim
    return replace(claim, otherwise={start: other.verdict for start, other in others.items()})


def beaten(news: News, tpot: float) -> tuple[list[Better], list[Better]]:
    """Layouts of the same 64 cards with more tokens/s than the announced one under a limit of TPOT (seconds), the best
    first and the announced one last; and what other weights would add to the best. InputError where the announced one
    does not keep the limit."""
    plain = news.layout(MANY, "two_tier_int8", balanced=True)

    def tokens(overlap: bool) -> float:
        outcome = best_load(replace(plain, overlap=overlap), news.work, tpot, news.p)
        return outcome.tokens if outcome else 0.0

    announced = replace(plain, overlap=max((True, False), key=tokens))
    found = better(announced, news.work, tpot, news.p)
    return found, precisions(found[0], news.work, tpot, news.p)
