"""Requests as they come: by chance at a rate, or as a file says."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from expertmesh.errors import InputError
from expertmesh.planner.serving import Workload

FIELDS = ("time", "input", "output")
MOST_TOKENS = 1 << 24  # of a request; more are a mistake


@dataclass(frozen=True, order=True)
class Arrival:
    """time: seconds since the start; input, output: tokens."""

    time: float
    input: int
    output: int


def poisson(rate: float, requests: int, work: Workload, seed: int = 0) -> list[Arrival]:
    """So many requests of equal lengths, `rate` a second on average, at times independent of each other.

    InputError where rate or number are not above 0.
    """
    if not (rate > 0 and isfinite(rate)) or requests < 1:
        raise InputError(f"{requests} requests at {rate:g} a second; both must be above 0")
    if max(work.input, work.output) > MOST_TOKENS:
        raise InputError(f"requests of {work.input:g} and {work.output:g} tokens; {MOST_TOKENS} are the most")
    gaps = np.random.default_rng(seed).exponential(1 / rate, requests)
    return [Arrival(time, round(work.input), round(work.output)) for time in np.cumsum(gaps).tolist()]


def read_trace(path: Path) -> list[Arrival]:
    """From a file with a line {"time": seconds, "input": tokens, "output": tokens} for each request, in any order.

    InputError names the file and the first line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give a JSONL file of requests, or poisson[:RATE]"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text in UTF-8; give a JSONL file of requests") from None
    return parse_trace(text.splitlines(), str(path))


def parse_trace(lines: Iterable[str], name: str) -> list[Arrival]:
    """Of the lines of a trace, blank ones left out; the earliest request first."""
    found = [_parse(line, f"{name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{name}: no requests; give a line {{{', '.join(FIELDS)}}} for each")
    return sorted(found)


def _parse(line: str, where: str) -> Arrival:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f'{where}: not JSON; give {{"time": 0.5, "input": 100, "output": 10}}') from None
    missing = [name for name in FIELDS if not isinstance(fields, dict) or name not in fields]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} missing; give seconds and numbers of tokens")
    for name in FIELDS:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
            raise InputError(f"{where}: {name} is {value!r}; it must be a number of at least 0")
        if name != "time" and not (value == int(value) and 1 <= value <= MOST_TOKENS):
            raise InputError(
                f"{where}: {name} is {value!r}; it must be a whole number from 1 to {MOST_TOKENS}"
            )
    return Arrival(float(fields["time"]), int(fields["input"]), int(fields["output"]))


def parse_arrivals(
    text: str, work: Workload, requests: int, rate: float | None = None, seed: int = 0
) -> list[Arrival]:
    """What an option says: "poisson" at `rate`, "poisson:RATE", or the path of a trace. InputError where it is none."""
    kind, colon, value = text.partition(":")
    if kind != "poisson":
        return read_trace(Path(text))
    if colon:
        try:
            rate = float(value)
        except ValueError:
            raise InputError(
                f"arrivals {text!r}: {value!r} is not a rate; give poisson:2.5 for 2.5 a second"
            ) from None
    if rate is None:
        raise InputError("arrivals by chance need a rate; give poisson:2.5 for 2.5 requests a second")
    return poisson(rate, requests, work, seed)
