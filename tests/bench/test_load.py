"""When requests come and how long they are: against the distributions that are asked for."""

import json
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError
from expertmesh.bench.load import Lengths, Load, parse_rate, read_load_trace

FIXED = Lengths.parse("--input", "10")
MANY = 20_000


def gaps(burstiness: float) -> np.ndarray:
    load = Load(FIXED, FIXED, rate=4.0, burstiness=burstiness, requests=MANY)
    return np.diff([arrival.time for arrival in load.arrivals()])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 9.0])
def test_gaps_have_the_rate_and_the_spread_of_a_gamma_distribution(burstiness: float) -> None:
    """Whose coefficient of variation is one over the root of its shape."""
    found = gaps(burstiness)
    assert found.mean() == pytest.approx(0.25, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_chance_without_bursts_is_a_poisson_process() -> None:
    """Of which as many gaps are longer than the mean as e says, whatever was before."""
    found = gaps(1.0)
    assert (found > 0.25).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert np.corrcoef(found[1:], found[:-1])[0, 1] == pytest.approx(0, abs=0.03)


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    uniform = Lengths.parse("--input", "uniform:3-7")
    assert {uniform.draw(rng) for _ in range(200)} == {3, 4, 5, 6, 7}
    lognormal = Lengths.parse("--input", "lognormal:200,0.5,600")
    drawn = [lognormal.draw(rng) for _ in range(4000)]
    assert np.median(drawn) == pytest.approx(200, rel=0.05) and max(drawn) == 600
    assert np.std(np.log([n for n in drawn if n < 600])) == pytest.approx(0.49, rel=0.1)


@given(st.integers(1, 50), st.integers(0, 99), st.floats(0.1, 50), st.one_of(st.none(), st.floats(0.01, 5)))
def test_the_same_seed_gives_the_same_requests_at_any_rate(
    number: int, seed: int, rate: float, duration: float | None
) -> None:
    lengths = Lengths.parse("--input", "uniform:1-1000")
    slow = list(Load(lengths, lengths, rate=rate, requests=number, seed=seed, duration=duration).arrivals())
    burst = list(Load(lengths, lengths, requests=number, seed=seed).arrivals())
    assert [(a.input, a.output) for a in slow] == [(a.input, a.output) for a in burst[: len(slow)]]
    assert all(arrival.time == 0 for arrival in burst) and slow[0].time == 0
    assert [a.time for a in slow] == sorted(a.time for a in slow)
    assert len(slow) == number or slow[-1].time < (duration or inf)


def test_a_trace_comes_at_its_times_or_in_a_closed_loop(tmp_path: Path) -> None:
    lines = [{"time": t, "input": 5, "output": 2} for t in (10.0, 12.5, 11.0)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trace = read_load_trace(tmp_path / "trace.jsonl")
    assert [a.time for a in Load(FIXED, FIXED, trace=trace).arrivals()] == [0.0, 1.0, 2.5]
    assert [a.time for a in Load(FIXED, FIXED, trace=trace, concurrency=2).arrivals()] == [0.0, 0.0, 0.0]
    assert len(list(Load(FIXED, FIXED, trace=trace, requests=2).arrivals())) == 2


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "1.5", "uniform:5", "uniform:9-3", "lognormal:5", "lognormal:0,1",
                                  "lognormal:5,-1", "lognormal:5,nan", "uniform:1-2-3", "99999999999"])  # fmt: skip
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(InputError, match=r"--output .* is no number of tokens; give 512, uniform:"):
        Lengths.parse("--output", text)


def test_rates() -> None:
    assert [parse_rate(text) for text in ("2", "2.5/s", "90/min", "inf")] == [2.0, 2.5, 1.5, inf]
    for text in ("fast", "2/h", ""):
        with pytest.raises(InputError, match="--rate"):
            parse_rate(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say how long"),
        ({"duration": 3.0}, "--duration needs --rate or --concurrency"),
        ({"requests": 0}, "--requests 0: it must be at least 1"),
        ({"requests": 1, "rate": 0.0}, "--rate 0"),
        ({"requests": 1, "rate": float("nan")}, "--rate nan"),
        ({"requests": 1, "burstiness": 0.0}, "--burstiness 0"),
        ({"requests": 1, "concurrency": 0}, "--concurrency 0"),
        ({"requests": 1, "prefix": -1}, "--prefix -1"),
    ],
)
def test_loads_that_cannot_be(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Load(FIXED, FIXED, **options)
