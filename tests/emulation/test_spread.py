"""Ranks of one command on emulated machines: what all say when one is killed or cut off."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.emulation import EMULATE, LIMIT, Start, emulating, needs_a_cluster

GENERATE = ["generate", "-p", "Once", "--dtype", "float32", "--max-tokens", "1900", "--ignore-eos", "--json"]
RANKS = [f"rank {n} (node {n // 2}, card {n % 2}) on node{n // 2}" for n in range(4)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with emulating(lambda: EMULATE, tmp_path) as call:
        yield call


def said(start: Start, *options: str) -> list[str]:
    """What expertmesh says when it fails, the driver's line last."""
    process = start("--nodes", "2", "--cards", "2", *options, "--", *GENERATE, "--timeout", "3")
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (1, "") and "Traceback" not in err, err
    found = [
        line.removeprefix("expertmesh: ") for line in err.splitlines() if line.startswith("expertmesh: ")
    ]
    return [line for line in found if not line.endswith("is cut off")]


@needs_a_cluster
def test_a_rank_that_is_killed(start: Start) -> None:
    *ends, driver = said(start, "--kill", "3@6")
    match = re.match(
        rf"{re.escape(RANKS[3])} died in (step \d+|the start): killed by signal 9 \(SIGKILL\)", driver
    )
    assert match, driver
    assert sorted(ends) == [f"{rank} ends: {driver}" for rank in RANKS[:3]]


@needs_a_cluster
def test_a_node_that_is_cut_off(start: Start) -> None:
    *ends, driver = said(start, "--cut", "1@6")
    assert re.match(
        rf"{re.escape(RANKS[2])} does not answer any more in (step \d+|the start), for 3 s now, nor does any",
        driver,
    )
    assert {f"{rank} ends: {driver}" for rank in RANKS[:2]} <= set(ends)
    far = sorted(line for line in ends if "on node1 ends" in line)
    assert len(far) == 2 and all("it has not heard the driver for 3 s, in " in line for line in far)


@needs_a_cluster
def test_a_node_that_is_cut_off_from_the_beginning(start: Start) -> None:
    lines = said(start, "--cut", "1@0")
    (driver,) = [
        line for line in lines if line.startswith(f"{RANKS[2]}, {RANKS[3]} did not come within 3 s: ")
    ]
    assert driver.endswith("2 of 4 ranks are there")
    assert {f"rank {n} on node0 ends: {driver}" for n in range(2)} <= set(lines)
    far = [line for line in lines if line.startswith(("rank 2 on node1", "rank 3 on node1"))]
    assert len(far) == 2 and all("cannot reach the driver at 10.77.0.1:" in line for line in far)
