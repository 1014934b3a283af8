"""Metrics for Prometheus: what the engine tells of itself (`engine.telemetry`), and what requests meet here.

Counters are read from the engine's state when they are asked for; times of requests are observed as answers go out.
"""

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from expertmesh.engine.arrays import from_plain
from expertmesh.engine.tally import Histogram
from expertmesh.request import Output
from expertmesh.server.states import State

CONTENT_TYPE = CONTENT_TYPE_LATEST
RECENT = 60.0  # seconds whose requests are told as recent
KEPT = 2048  # values of them at most
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
REQUEST = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Sample: TypeAlias = tuple[Sequence[str], float]


class Metrics:
    """Of one server. `observed` sees answers go by, `render` is what Prometheus reads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first, self._whole = Histogram(FIRST_TOKEN), Histogram(REQUEST)
        self._between, self._each = Histogram(TOKEN), Histogram(TOKEN)
        # (when, seconds) of the last requests.
        self._recent: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=KEPT) for name in ("ttft", "tpot")
        }

    async def observed(
        self, outputs: AsyncGenerator[tuple[int, Output]]
    ) -> AsyncGenerator[tuple[int, Output]]:
        """The same outputs, their times taken. A call begins when it is first waited for."""
        begin = self._clock()
        first: dict[int, float] = {}
        last: dict[int, tuple[float, int]] = {}
        async with aclosing(outputs):
            async for number, output in outputs:
                now, count = self._clock(), len(output.token_ids)
                if number not in first and count:
                    first[number] = now
                    self._first.observe(now - begin)
                    self._recent["ttft"].append((now, now - begin))
                elif number in last and count > last[number][1]:
                    self._between.observe((now - last[number][0]) / (count - last[number][1]))
                if count:
                    last[number] = now, count
                if output.finished and output.finish_reason != "abort":
                    self._finish(now - begin, now - first.get(number, now), count, now)
                yield number, output

    def _finish(self, whole: float, decoding: float, tokens: int, now: float) -> None:
        self._whole.observe(whole)
        if tokens > 1:
            self._each.observe(decoding / (tokens - 1))
            self._recent["tpot"].append((now, decoding / (tokens - 1)))

    def recent(self) -> dict[str, float | None]:
        """Median and 95th percentile of the last minute's requests, in seconds; None where there were none."""
        since, told = self._clock() - RECENT, {}
        for name, values in self._recent.items():
            while values and values[0][0] < since:
                values.popleft()
            for percent in (50, 95):
                seconds = [value for _, value in values]
                told[f"{name}_p{percent}"] = float(np.percentile(seconds, percent)) if seconds else None
        return told

    def render(self, state: State | None, experts: bool = False) -> bytes:
        """Prometheus text. experts: also a series for each layer and expert, 14,848 for DeepSeek-V3."""
        registry = CollectorRegistry()
        registry.register(_Collected([*_of_engine(state, experts), *self._of_requests()]))
        return generate_latest(registry)

    def _of_requests(self) -> Iterator[Metric]:
        yield _histogram("time_to_first_token_seconds", "From the call to its first token", self._first)
        yield _histogram("inter_token_seconds", "Between two tokens of an answer", self._between)
        text = "Mean of a request, without its first token"
        yield _histogram("time_per_output_token_seconds", text, self._each)
        yield _histogram("request_seconds", "From the call to the end of the answer", self._whole)


class _Collected:
    """Implements `prometheus_client.registry.Collector`."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_engine(state: State | None, experts: bool) -> Iterator[Metric]:
    alive = state is not None and state["problem"] is None
    yield _gauge("up", "Whether the engine runs", [], [((), float(alive))])
    if state is None:
        return
    yield from _requests(state)
    yield from _cache(state["cache"])
    yield from _steps(state)
    yield from _experts(state["experts"], experts)
    yield from _links(state["links"])
    if state["balance"] is not None:
        yield from _balance(state["balance"])
    yield from _cluster(state)


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    family = GaugeMetricFamily(f"expertmesh_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    family = CounterMetricFamily(f"expertmesh_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(f"expertmesh_{name}", text)
    bounds = [*map(str, histogram.bounds), "+Inf"]
    family.add_metric([], list(zip(bounds, histogram.cumulative, strict=True)), histogram.sum)
    return family


def _numbered(values: Iterable[float]) -> list[Sample]:
    return [((str(number),), value) for number, value in enumerate(values)]


def _requests(state: State) -> Iterator[Metric]:
    requests, tokens, queue = state["requests"], state["tokens"], state["queue"]
    group = ["group"]
    yield _gauge("requests_running", "Requests that compute", group, _numbered(requests["running"]))
    yield _gauge("requests_waiting", "Requests that wait", group, _numbered(requests["waiting"]))
    yield _counter("requests_submitted", "Requests that came", [], [((), requests["submitted"])])
    finished = [((reason,), requests["finished"].get(reason, 0)) for reason in ("stop", "length", "abort")]
    yield _counter("requests_finished", "Requests that ended, by reason", ["reason"], finished)
    text = "Requests whose pages were taken back, to be computed again"
    yield _counter("preemptions", text, [], [((), requests["preemptions"])])
    yield _counter("prompt_tokens", "Tokens of prompts that have begun", [], [((), tokens["prompt"])])
    text = "Of these, tokens found in the prefix cache"
    yield _counter("prompt_tokens_cached", text, [], [((), tokens["cached"])])
    yield _counter("generation_tokens", "Tokens chosen", [], [((), tokens["generated"])])
    yield _counter("rows", "Token rows computed", [], [((), tokens["rows"])])
    queued = Histogram(tuple(queue["bounds"]), queue["counts"], queue["sum"])
    yield _histogram("request_queue_seconds", "From the call to its first row", queued)


def _cache(cache: dict[str, Any]) -> Iterator[Metric]:
    yield _gauge("cache_pages", "Pages of the latent cache", ["group"], _numbered(cache["pages"]))
    yield _gauge("cache_pages_used", "Pages that some request holds", ["group"], _numbered(cache["used"]))
    yield _gauge("cache_page_tokens", "Tokens in a page", [], [((), cache["page_size"])])


def _steps(state: State) -> Iterator[Metric]:
    steps, parts = state["steps"], state["parts"]
    yield _counter("steps", "Steps of the engine", [], [((), steps["count"])])
    samples: list[Sample] = [((part,), seconds) for part, seconds in steps["seconds"].items()]
    yield _counter("step_seconds", "Time of steps, by part", ["part"], samples)
    yield _counter("measured_steps", "Steps whose parts ranks have measured", [], [((), parts["steps"])])
    samples = [
        ((str(rank), part), seconds)
        for rank, each in enumerate(parts["seconds"])
        for part, seconds in zip(parts["names"], each, strict=True)
    ]
    yield _counter("rank_step_seconds", "Time of measured steps, by rank and part", ["rank", "part"], samples)


def _experts(experts: dict[str, Any], each: bool) -> Iterator[Metric]:
    layers, cards_LR = experts["layers"], from_plain(experts["cards"])
    samples = [((str(n),), value) for n, value in zip(layers, experts["imbalance"], strict=True)]
    text = "Rows of the fullest card over the mean, of the last seconds"
    yield _gauge("layer_imbalance_ratio", text, ["layer"], samples)
    mean_L = np.maximum(cards_LR.mean(1), 1e-9) if cards_LR.size else np.zeros(0)
    yield _gauge(
        "card_load_ratio",
        "Rows of a card over the layer's mean, of the last seconds",
        ["layer", "rank"],
        _table(layers, cards_LR / mean_L[:, None]),
    )
    if each:
        text = "Rows that chose an expert"
        yield _counter("expert_rows", text, ["layer", "expert"], _table(layers, from_plain(experts["total"])))


def _table(layers: Sequence[int], values: Any) -> list[Sample]:
    return [
        ((str(layer), str(column)), value)
        for layer, row in zip(layers, values.tolist(), strict=True)
        for column, value in enumerate(row)
    ]


def _links(links: dict[str, Any]) -> Iterator[Metric]:
    samples = [
        ((purpose, tier), size)
        for purpose, sizes in links["bytes"].items()
        for tier, size in zip(("in_node", "across"), sizes, strict=True)
    ]
    yield _counter("sent_bytes", "Bytes between ranks", ["purpose", "tier"], samples)
    samples = [
        ((str(source), str(target)), size)
        for source, row in enumerate(links["nodes"])
        for target, size in enumerate(row)
    ]
    yield _counter("node_sent_bytes", "Bytes from node to node", ["source", "target"], samples)


def _balance(balance: dict[str, Any]) -> Iterator[Metric]:
    for name, key, text in (
        ("looks", "looks", "Looks at the loads"),
        ("plans", "plans", "Placements that were planned"),
        ("plans_refused", "refused", "Plans that would not have paid"),
        ("rounds", "swaps", "Placements that took effect"),
        ("moved_experts", "moved", "Experts that moved"),
        ("moved_bytes", "moved_bytes", "Bytes of weights that moved"),
        ("seconds", "seconds", "Time between steps spent on moving"),
        ("failures", "failures", "Plans and moves that failed"),
    ):
        yield _counter(f"balancer_{name}", text, [], [((), balance[key])])
    moving = [((), float(balance["doing"] == "moving"))]
    yield _gauge("balancer_moving", "Whether experts move now", [], moving)


def _cluster(state: State) -> Iterator[Metric]:
    cluster, model = state["cluster"], state["model"]
    family = InfoMetricFamily("expertmesh_engine", "The model's shape and the cluster's")
    family.add_metric([], {name: str(value) for name, value in (model | cluster).items()})
    yield family
    cards = cluster["cards_per_node"]
    samples = [
        ((str(rank), str(rank // cards), one["host"]), one["silence"])
        for rank, one in enumerate(state["ranks"])
    ]
    text = "Time since a rank was last heard"
    yield _gauge("rank_silence_seconds", text, ["rank", "node", "host"], samples)
    yield _gauge("uptime_seconds", "Since the engine was made", [], [((), state["uptime"])])
    yield _counter("telemetry_seconds", "Time spent on telling all this", [], [((), state["seconds"])])
