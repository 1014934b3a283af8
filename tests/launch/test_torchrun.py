"""Processes that torchrun has started: their assignment, where the driver is reached, and a start after a failure."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from expertmesh import LLM, SamplingParams
from expertmesh.errors import InputError, RankFailure
from expertmesh.launch import torchrun
from expertmesh.launch.store import Store
from expertmesh.launch.torchrun import Assignment, leading, own_address, work
from tests.support.emulation import LIMIT, Said, Start, emulating

ENVIRONMENT = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
}
ELASTIC = {
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
LENGTH = 400


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with emulating(lambda: [os.path.join(os.path.dirname(sys.executable), "torchrun")], tmp_path) as call:
        yield call


def worker_of(agent: int, rank: int) -> psutil.Process:
    (found,) = [p for p in psutil.Process(agent).children() if p.environ().get("RANK") == str(rank)]
    return found


def test_one_machine_and_a_rank_that_is_killed_once(start: Start, tmp_path: Path, tiny_folder: Path) -> None:
    """All are started again, and find the store, and not the driver, of before."""
    params = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
    with LLM(tiny_folder, cache_tokens=1024) as alone:
        expected = alone.generate([[5, 6, 7]], params)[0].token_ids
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--log-dir", str(tmp_path / "logs")]
    words = [
        "--token-ids",
        "5,6,7",
        "--max-tokens",
        str(LENGTH),
        "--temperature",
        "0",
        "--ignore-eos",
        "--json",
    ]
    process = start(
        *options, "-m", "expertmesh", "generate", str(tiny_folder), *words, "--cache-tokens", "1024"
    )
    err = Said(process.stderr)
    err.wait_for("MB a rank")
    worker_of(process.pid, 1).send_signal(signal.SIGKILL)
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(LIMIT) == 0 and [o["token_ids"] for o in json.loads(out)] == [expected]
    said = err.all()
    assert sum("MB a rank" in line for line in said) == 2
    failures = [line for line in said if line.startswith("expertmesh: ")]
    assert len(failures) == 2 and all("rank 1 (node 0, card 1) on " in line for line in failures)


def test_assignment() -> None:
    assert Assignment.of({}) is None and Assignment.of(ENVIRONMENT | {"RANK": "1"}) is not None
    for name in ENVIRONMENT:
        assert Assignment.of({key: value for key, value in ENVIRONMENT.items() if key != name}) is None
    place = Assignment.of(ENVIRONMENT | ELASTIC)
    assert place == Assignment(5, 8, 4, ("127.0.0.1", 29999), elastic=True, run="run", restarts=2)
    assert str(place).startswith("rank 5 (node 1, card 1) on ")
    with pytest.raises(InputError, match="9 ranks in all, but 4 on this machine"):
        Assignment.of(ENVIRONMENT | {"WORLD_SIZE": "9"})


def test_a_driver_that_ends_before_it_has_called_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the words of another start, though: machines do not count these alike."""
    monkeypatch.setattr(torchrun.signal, "signal", lambda *_: None)  # this process keeps its own
    store = Store("127.0.0.1", _free_port(), hosts=True, timeout=5)
    port = int(store._store.port)
    places = [
        Assignment(rank, 2, 1, ("127.0.0.1", port), elastic=True, run="run", restarts=n)
        for rank, n in ((0, 0), (1, 0), (1, 1))
    ]
    with pytest.raises(InputError), leading(places[0]):
        raise InputError("no prompt")
    with pytest.raises(RankFailure, match=r"rank 1 \(node 1, card 0\) on \S+ ends: the driver.*: no prompt"):
        work(places[1], 5, None, {})
    with pytest.raises(
        RankFailure, match=r"waited 0.3 s for the driver, the process of rank 0, to say at 127"
    ):
        work(places[2], 0.3, None, {})


def test_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}
    monkeypatch.setattr(torchrun, "interfaces", lambda: known)
    assert own_address("127.0.0.1", None, 1) == "127.0.0.1"
    assert own_address("10.0.0.1", None, 2) == "10.0.0.1"
    # The name of a machine may be a loopback address on itself.
    assert own_address("127.0.1.1", None, 2) == "10.0.0.1"
    known["eth1"] = "10.1.0.1"
    with pytest.raises(InputError, match=r"127.0.1.1 is 127.0.1.1 here.* --interface, of: eth0 .*, eth1 "):
        own_address("127.0.1.1", None, 2)
    with pytest.raises(InputError, match=r"no-such\.invalid has no address"):
        own_address("no-such.invalid", None, 2)
    assert own_address("10.9.9.9", "lo", 2) == "127.0.0.1"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
