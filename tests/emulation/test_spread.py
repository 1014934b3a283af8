"""Ranks of one command on emulated machines: what all say when one is killed or cut off."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from expertmesh.emulation.namespaces import configure, inside
from expertmesh.emulation.spread import VARIABLE
from tests.support.emulation import EMULATE, LIMIT, Start, emulating, needs_a_cluster

GENERATE = ["generate", "-p", "Once", "--dtype", "float32", "--max-tokens", "1900", "--ignore-eos", "--json"]
RANKS = [f"rank {n} (node {n // 2}, card {n % 2}) on node{n // 2}" for n in range(4)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with emulating(lambda: EMULATE, tmp_path) as call:
        yield call


def said(start: Start, *options: str, meanwhile: Callable[[int], None] = lambda pid: None) -> list[str]:
    """What expertmesh says when it fails, the driver's line last. meanwhile: called with the pid of the emulation."""
    process = start("--nodes", "2", "--cards", "2", *options, "--", *GENERATE, "--timeout", "3")
    meanwhile(process.pid)
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


@needs_a_cluster
def test_a_link_that_carries_nothing_between_two_nodes_that_the_driver_hears(start: Start) -> None:
    """What node 1 sends to node 2 is for a machine that is not there."""
    *ends, driver = said(start, "--nodes", "3", "--cards", "1", meanwhile=lose_what_node_1_sends_to_node_2)
    names = [f"rank {n} (node {n}, card 0) on node{n}" for n in range(3)]
    pairs = [f"{names[a]} has got nothing of {names[b]} in " for a, b in ((1, 2), (2, 1))]
    assert driver.startswith(tuple(pairs)) and "for 3 s now, though both answer: the link" in driver
    assert sorted(ends) == [f"{name} ends: {driver}" for name in names]


def lose_what_node_1_sends_to_node_2(emulation: int) -> None:
    def cluster() -> dict[str, Any] | None:
        for process in psutil.Process(emulation).children(recursive=True):
            with suppress(psutil.Error):
                if (text := process.environ().get(VARIABLE)) and len(process.children(recursive=True)) > 3:
                    return dict(json.loads(text))
        return None

    while (found := cluster()) is None:
        time.sleep(0.1)
    time.sleep(3)  # the ranks have met by now, or do not come at all
    descriptor = os.open(found["nodes"][1]["namespace"], os.O_RDONLY)
    change = "neighbour replace 10.77.0.3 lladdr 02:00:00:00:00:99 nud permanent dev eth0"
    inside(descriptor, lambda: configure("ip", [change]))
    os.close(descriptor)
