"""Figures of requests that were timed: latencies, throughput, errors, and what kept within limits."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expertmesh.bench.client import Timing

PERCENTILES = (50, 90, 99)
MEASURES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True)
class Limits:
    """Milliseconds; None: whatever it is. ttft: from sending to the first text. tpot: mean time of each further token.
    e2e: of the whole answer."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept(self, timing: Timing) -> bool:
        """Whether a request was answered, within all limits. One whose figure is not known has not kept it."""
        if timing.error is not None:
            return False
        values = {"ttft": ttft(timing), "tpot": tpot(timing), "e2e": e2e(timing)}
        return all(
            (value := values[name]) is not None and value <= limit
            for name, limit in asdict(self).items()
            if limit is not None
        )

    def __bool__(self) -> bool:
        return any(limit is not None for limit in asdict(self).values())


def ttft(timing: Timing) -> float | None:
    """Milliseconds to the first text; None where no text came in pieces."""
    return 1000 * (timing.texts[0] - timing.sent) if timing.texts else None


def tpot(timing: Timing) -> float | None:
    """Milliseconds of each token after the first, a mean; 0 where there is one, None where nothing was streamed."""
    if not timing.texts:
        return None
    return 1000 * (timing.texts[-1] - timing.texts[0]) / max(1, timing.output - 1)


def e2e(timing: Timing) -> float:
    """Milliseconds to the end of the answer."""
    return 1000 * (timing.end - timing.sent)


def gaps(timing: Timing) -> Iterable[float]:
    """Milliseconds between one text and the next."""
    return (1000 * (b - a) for a, b in zip(timing.texts, timing.texts[1:], strict=False))


def report(timings: Sequence[Timing], limits: Limits) -> dict[str, Any]:
    """Everything of a run. Latencies are of requests that went well, in milliseconds; rates are over the time from the
    first request to the end of the last."""
    good = [timing for timing in timings if timing.error is None]
    seconds = max((t.end for t in timings), default=0.0) - min((t.sent for t in timings), default=0.0)
    tokens_in, tokens_out = sum(t.input for t in good), sum(t.output for t in good)
    rate = 1 / seconds if seconds > 0 else 0.0
    found: dict[str, Any] = {
        "requests": len(timings),
        "completed": len(good),
        "seconds": seconds,
        "errors": _errors(timings),
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "cached_tokens": sum(t.cached for t in good),
        "other_lengths": sum((t.input, t.output) != t.asked for t in good),
        "requests_per_second": len(good) * rate,
        "output_tokens_per_second": tokens_out * rate,
        "tokens_per_second": (tokens_in + tokens_out) * rate,
        "latency_ms": {
            "ttft": summary([v for t in good if (v := ttft(t)) is not None]),
            "tpot": summary([v for t in good if t.output > 1 and (v := tpot(t)) is not None]),
            "itl": summary([gap for t in good for gap in gaps(t)]),
            "e2e": summary([e2e(t) for t in good]),
        },
    }
    if limits:
        kept = sum(map(limits.kept, timings))
        share = kept / len(timings) if timings else 0.0
        found["goodput"] = asdict(limits) | {"requests_per_second": kept * rate, "share": share}
    return found


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum; None of nothing."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES).tolist()
    return {
        "mean": float(np.mean(values)),
        **{f"p{p}": value for p, value in zip(PERCENTILES, points, strict=True)},
        "max": max(values),
    }


def _errors(timings: Sequence[Timing]) -> dict[str, dict[str, Any]]:
    """How many of each kind, and what was said of the first, the most frequent kind first."""
    failed = [timing for timing in timings if timing.error is not None]
    kinds = Counter(str(timing.error) for timing in failed)
    said = {str(timing.error): timing.message for timing in reversed(failed)}
    return {kind: {"requests": number, "first": said[kind]} for kind, number in kinds.most_common()}
