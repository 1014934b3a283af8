"""Arrivals: by chance, or from a file whose first wrong line is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import InputError
from expertmesh.planner.arrivals import Arrival, parse_arrivals, parse_trace, poisson, read_trace
from expertmesh.planner.serving import Workload

WORK = Workload(100, 10)
GOOD = '{"time": 1, "input": 5, "output": 2}'


@given(st.lists(st.builds(Arrival, st.floats(0, 1e6), st.integers(1, 9999), st.integers(1, 9999))))
def test_a_trace_is_read_in_the_order_of_time(requests: list[Arrival]) -> None:
    """Whatever the order of its lines, with blank ones and further fields."""
    lines = [json.dumps({"time": a.time, "input": a.input, "output": a.output, "id": 7}) for a in requests]
    if requests:
        assert parse_trace(["", *lines, " "], "trace") == sorted(requests)
    else:
        with pytest.raises(InputError, match="trace: no requests"):
            parse_trace(lines, "trace")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2, 3]", "time, input, output missing"),
        ('{"time": 1, "input": 5}', "output missing"),
        ('{"time": -1, "input": 5, "output": 2}', "time is -1"),
        ('{"time": NaN, "input": 5, "output": 2}', "time is nan"),
        ('{"time": "1", "input": 5, "output": 2}', "time is '1'"),
        ('{"time": 1, "input": 0, "output": 2}', "input is 0"),
        ('{"time": 1, "input": 5.5, "output": 2}', "input is 5.5"),
        ('{"time": 1, "input": 5, "output": true}', "output is True"),
        ('{"time": 1, "input": 5, "output": 1e300}', "output is 1e"),
    ],
)
def test_the_wrong_line_is_named(line: str, wrong: str) -> None:
    with pytest.raises(InputError, match="trace, line 3: ") as caught:
        parse_trace([GOOD, "", line, "also wrong"], "trace")
    assert wrong in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_option_says(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(GOOD, encoding="utf-8")
    assert parse_arrivals(str(file), WORK, 3) == [Arrival(1.0, 5, 2)]
    assert parse_arrivals("poisson:2.5", WORK, 3) == poisson(2.5, 3, WORK)
    assert parse_arrivals("poisson", WORK, 3, 2.5, 1) == poisson(2.5, 3, WORK, 1) != poisson(2.5, 3, WORK)
    for text in ("poisson", "poisson:x", "poisson:0", "poisson:inf", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(InputError):
            parse_arrivals(text, WORK, 3)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_trace(file)
    with pytest.raises(InputError, match="are the most"):
        poisson(1.0, 1, Workload(float("inf"), 1))


def test_chance_comes_at_its_rate() -> None:
    """Gaps are exponential: mean and standard deviation are one over the rate."""
    gaps = np.diff([a.time for a in poisson(4.0, 20_000, WORK)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.03)
