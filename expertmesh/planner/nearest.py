"""Why nothing is within the limits, and what would be: one sentence."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from expertmesh.errors import InputError
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.memory import RESERVED, cache_bytes, static_memory
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.plans import Limits, held
from expertmesh.planner.search import Point, Search
from expertmesh.planner.serving import ADMISSION, Workload, prefill_time
from expertmesh.planner.space import MOST_CARDS, Mode, Space


def refusal(space: Space, work: Workload, limits: Limits, p: Parameters | None = None) -> InputError:
    """The error for a search that has found nothing: what is nearest."""
    points = list(_points(space, work, p))
    if not points:
        return _too_small(space, work)
    total = space.cluster.total
    quickest = min(points, key=lambda point: point.tpot)
    within = [point for point in points if point.tpot <= limits.tpot]
    if not within:
        said = (
            f"no layout has a TPOT of {limits.tpot * 1e3:g} ms; the lowest is {quickest.tpot * 1e3:.2f} ms, with one "
            f"request in each TP group: {quickest.tokens / total:.3g} tokens/s per card"
        )
        return InputError(f"{said}; allow more, or take other cards")
    first = min(within, key=lambda point: point.ttft)
    beside = f" with a TPOT of at most {limits.tpot * 1e3:g} ms" if limits.tpot < inf else ""
    return InputError(
        f"no layout has a TTFT of {limits.ttft * 1e3:g} ms{beside}; the lowest is {first.ttft * 1e3:.0f} ms, with one "
        f"request in each TP group: {first.tokens / total:.3g} tokens/s per card; allow more, or take more cards"
    )


def _points(space: Space, work: Workload, p: Parameters | None) -> Iterator[Point]:
    """Of the whole cluster, with one request in each TP group."""
    search, cluster = Search(space, work, [inf], p=p), space.cluster
    whole: Mode = "elsewhere" if space.mode == "elsewhere" else "together"
    sizes = [size for size in cluster.sizes() if size.nodes < cluster.nodes]
    alone = None
    if space.mode in (None, "apart"):
        alone = min((_alone(d, work, p) for d in _prefilling(search)), default=None)
    for size in cluster.sizes():
        n = cluster.instances(size, cluster.nodes)
        rest = max((cluster.instances(size, k) for k in range(1, cluster.nodes)), default=0)
        for tp in space.tps(size):
            for d in space.layouts(size, tp):
                if n and space.mode != "apart" and held(d, whole, work) >= 1:
                    point = (search.decoding if whole == "elsewhere" else search.serving)(d)(1.0)
                    yield replace(point, tokens=n * point.tokens)
                if alone is not None and size in sizes and rest and held(d, "apart", work) >= 1:
                    point = search.decoding(d)(1.0)
                    yield Point(point.tpot, alone, rest * point.tokens)


def _prefilling(search: Search) -> Iterator[Deployment]:
    for size in search.cluster.sizes():
        if size.nodes < search.cluster.nodes:
            for tp in search.space.tps(size):
                for d in search.space.layouts(size, tp, prefill=True):
                    if search.prefills(d):
                        yield d


def _alone(d: Deployment, work: Workload, p: Parameters | None) -> float:
    return ADMISSION + prefill_time(d, work, p, 1 / d.topology.groups)


def _too_small(space: Space, work: Workload) -> InputError:
    """What is missing, and how many nodes it would take."""
    card, cluster = space.cluster.card, space.cluster
    need = min((_need(d, work) for d in _layouts(space)), default=0.0)
    there = card.memory_gb * (1 - RESERVED)
    nodes = cluster.nodes
    while nodes * cluster.cards <= MOST_CARDS:
        nodes += 1 if nodes < 16 else nodes // 8
        larger = replace(space, cluster=replace(cluster, nodes=min(nodes, MOST_CARDS // cluster.cards)))
        if any(_need(d, work) <= there for d in _layouts(larger)):
            break
    else:
        nodes = 0
    advice = (
        f"it takes {nodes} nodes of {cluster.cards}" if nodes else "more cards do not help: take larger ones"
    )
    return InputError(
        f"{space.weights} weights and one request of {work.context:.0f} tokens need {need:.1f} GB a rank, and of "
        f"{card.title} {there:.1f} of {card.memory_gb:g} GB are for them; {advice}, or fewer bits"
    )


def _need(d: Deployment, work: Workload) -> float:
    return (sum(static_memory(d).values()) + work.context * cache_bytes(d)) / 1e9


def _layouts(space: Space) -> Iterator[Deployment]:
    """The first of each attention TP of the largest instance, which needs least."""
    size = space.cluster.sizes()[-1]
    return (next(iter(space.layouts(size, tp))) for tp in space.tps(size))
