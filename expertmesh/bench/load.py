"""What a server is loaded with: when requests come, and how long they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from math import inf, log
from pathlib import Path

import numpy as np

from expertmesh.errors import InputError
from expertmesh.planner.arrivals import MOST_TOKENS, Arrival, read_trace

FORMS = "512, uniform:100-900 or lognormal:MEDIAN,SIGMA[,MOST]"
Draw = Callable[[np.random.Generator], int]


@dataclass(frozen=True)
class Lengths:
    """How many tokens: a number, or a distribution of it. `text` is what was given, for reports."""

    text: str
    draw: Draw

    @classmethod
    def parse(cls, name: str, text: str) -> "Lengths":
        """name: the option, for the InputError where this is no length."""
        kind, _, rest = text.partition(":")
        try:
            if kind == "uniform":
                low, high = (_tokens(word) for word in rest.split("-"))
                if low > high:
                    raise ValueError(f"{low} is more than {high}")
                return cls(text, lambda rng: int(rng.integers(low, high + 1)))
            if kind == "lognormal":
                return cls(text, _lognormal(*rest.split(",")))
            fixed = _tokens(text)
        except (ValueError, TypeError):
            raise InputError(
                f"{name} {text!r} is no number of tokens; give {FORMS}, each from 1 to {MOST_TOKENS}"
            ) from None
        return cls(text, lambda rng: fixed)


def _tokens(word: str) -> int:
    number = int(word)
    if not 1 <= number <= MOST_TOKENS:
        raise ValueError(word)
    return number


def _lognormal(median: str, sigma: str, most: str = str(MOST_TOKENS)) -> Draw:
    middle, spread, limit = _tokens(median), float(sigma), _tokens(most)
    if not 0 <= spread <= 10:
        raise ValueError(sigma)
    return lambda rng: max(1, min(limit, round(rng.lognormal(log(middle), spread))))


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    rate: requests a second on average, inf for all at once. burstiness: of the gaps between them, which have a gamma
    distribution of this shape: 1 is a Poisson process, less comes in bursts, more is regular. concurrency: most
    requests at the same time; with a rate of inf a closed loop. requests: how many; duration: seconds in which they
    are sent; at least one of both. prefix: tokens that all prompts begin with, beside their own. trace: requests as
    they came elsewhere, instead of rate and lengths.
    """

    input: Lengths
    output: Lengths
    rate: float = inf
    burstiness: float = 1.0
    concurrency: int | None = None
    requests: int | None = None
    duration: float | None = None
    prefix: int = 0
    seed: int = 0
    trace: tuple[Arrival, ...] = ()

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise InputError(f"--rate {self.rate:g}: it must be above 0, or inf")
        if not 0 < self.burstiness < inf:
            raise InputError(f"--burstiness {self.burstiness:g}: it must be above 0")
        for name, low in (("concurrency", 1), ("requests", 1), ("duration", 0), ("prefix", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value < inf:
                raise InputError(f"--{name} {value:g}: it must be at least {low}")
        if self.trace and (self.rate < inf or self.burstiness != 1):
            raise InputError("--trace says when requests come; leave out --rate and --burstiness")
        if self.requests is None and not self.trace:
            if self.duration is None:
                raise InputError("say how long: --requests or --duration")
            if self.rate == inf and self.concurrency is None:
                raise InputError(
                    "--duration needs --rate or --concurrency too: without, requests without end come at once"
                )

    def arrivals(self) -> Iterator[Arrival]:
        """When requests come, in seconds from the start, and what they are. The same in every iteration."""
        every = islice(self._replayed() if self.trace else self._drawn(), self.requests)
        return takewhile(lambda arrival: arrival.time < self.end, every)

    @property
    def end(self) -> float:
        """Seconds from the start after which nothing is sent."""
        return inf if self.duration is None else self.duration

    def _replayed(self) -> Iterator[Arrival]:
        start = self.trace[0].time
        for arrival in self.trace:
            yield replace(arrival, time=0.0 if self.concurrency else arrival.time - start)

    def _drawn(self) -> Iterator[Arrival]:
        """Times and lengths have random numbers of their own, so that the requests are the same at any rate."""
        gaps, sizes = (np.random.default_rng([self.seed, stream]) for stream in (0, 1))
        time = 0.0
        for number in count():
            if number and self.rate < inf:
                time += gaps.gamma(self.burstiness, 1 / (self.rate * self.burstiness))
            yield Arrival(time, self.input.draw(sizes), self.output.draw(sizes))

    def describe(self) -> str:
        """In words, for a report."""
        if self.trace:
            lengths, when = f"{len(self.trace)} requests of a trace", "at its times"
        else:
            lengths = f"{self.input.text} + {self.output.text} tokens"
            when = f"{self.rate:g} a second" + (
                "" if self.burstiness == 1 else f" (burstiness {self.burstiness:g})"
            )
        if self.concurrency is not None:
            closed = self.trace or self.rate == inf
            when = (
                f"{self.concurrency} at any time"
                if closed
                else f"{when}, at most {self.concurrency} at a time"
            )
        elif self.rate == inf and not self.trace:
            when = "all at once"
        return f"{lengths}, {when}" + (f", {self.prefix} more shared by all prompts" if self.prefix else "")


def parse_rate(text: str) -> float:
    """Requests a second: "2", "2/s", "90/min", "inf". InputError where it is none."""
    number, _, unit = text.partition("/")
    try:
        return float(number) / {"": 1, "s": 1, "min": 60}[unit]
    except (ValueError, KeyError):
        raise InputError(f"--rate {text!r} is no rate; give 2/s, 90/min or inf") from None


def read_load_trace(path: Path | None) -> tuple[Arrival, ...]:
    """The trace, if one is given. InputError where the file is none."""
    return tuple(read_trace(path)) if path is not None else ()
