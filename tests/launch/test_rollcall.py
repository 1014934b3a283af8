"""Machines that find each other: each counts once, while it is there; and what cannot be understood is said."""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import pytest

from expertmesh.emulation.cluster import EmulatedCluster
from expertmesh.errors import InputError
from expertmesh.launch import rollcall
from expertmesh.launch.joining import software
from expertmesh.launch.rollcall import COUNT, VERDICT, Machine, Rendezvous, Roll
from expertmesh.launch.store import Store
from tests.support.emulation import needs_a_cluster, on

pytestmark = pytest.mark.timeout(120)

LIMIT = 60.0
MINE = Machine("a", "10.0.0.1", 3, 1, software())
OTHER, THIRD = replace(MINE, host="b", address="10.0.0.3"), replace(MINE, host="c", address="10.0.0.2")


@pytest.fixture
def store() -> Store:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return Store("127.0.0.1", port, hosts=True, timeout=LIMIT)


def come(store: Store, *machines: Machine | str) -> None:
    """They say that they are there, and nothing more."""
    for machine in machines:
        said = machine if isinstance(machine, str) else json.dumps(asdict(machine))
        store.set(rollcall._key(store.add(COUNT, 1)), said)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_line_that_was_interrupted_and_started_again_counts_once(store: Store) -> None:
    come(store, MINE, OTHER, OTHER)
    verdict = rollcall._preside(store, 1, MINE, "here", 0.5)
    assert not verdict["wrong"] and verdict["because"].startswith(
        "2 of 3 machines came to here within 0.5 s: a (10.0.0.1), b (10.0.0.3); start"
    )
    come(store, THIRD)
    assert rollcall._preside(store, 1, MINE, "here", 0.5)["order"] == [1, 4, 3]


def test_nobody_takes_the_place_of_who_presides(store: Store) -> None:
    come(store, MINE, MINE, OTHER, THIRD)
    assert rollcall._preside(store, 1, MINE, "here", 0.5)["order"] == [1, 4, 3]


def test_a_machine_counts_while_it_gives_signs_of_life(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "GONE", 0.2)
    come(store, MINE, OTHER)
    attendance = rollcall._Attendance(store, 1, MINE)
    for _ in range(2):
        assert attendance.look() == {1: MINE, 2: OTHER}
        time.sleep(0.3)
        assert attendance.look() == {1: MINE}
        store.add(rollcall._beats(2), 1)


def test_a_machine_that_waits_gives_signs_of_life(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "BEAT", 0.1)
    thread = threading.Thread(target=rollcall._listen, args=(store, 2, "here", LIMIT))
    thread.start()
    wait_until(lambda: store.add(rollcall._beats(2), 0) > 2)
    store.set(VERDICT, "{}")
    thread.join()


@pytest.mark.parametrize(
    "said",
    [
        "",
        "x",
        "[]",
        "{}",
        json.dumps(asdict(OTHER) | {"more": 1}),
        json.dumps(asdict(OTHER) | {"cards": "1"}),
        json.dumps(asdict(OTHER) | {"address": "b"}),
    ],
)
def test_what_cannot_be_understood(said: str, store: Store) -> None:
    come(store, MINE, said, THIRD)
    assert rollcall._preside(store, 1, MINE, "here", LIMIT) == {
        "because": f"a machine has come that says {said!r}, which this expertmesh does not understand: install the "
        "same on all machines",
        "wrong": True,
    }


@needs_a_cluster
def test_two_lines_on_one_machine() -> None:
    """The last one counts, and the other one hears why it does not."""
    said: dict[str, Roll | InputError] = {}
    with EmulatedCluster(3) as cluster:
        meet = Rendezvous("10.77.0.1", 29500)

        def call(node: int, name: str) -> None:
            try:
                said[name] = on(cluster.nodes[node], partial(meet.call, 3, 1, LIMIT, None))
            except InputError as error:
                said[name] = error

        threads = [
            threading.Thread(target=call, args=each)
            for each in ((0, "first"), (1, "before"), (1, "again"), (2, "last"))
        ]
        threads[0].start()
        store = on(cluster.nodes[0], lambda: Store("10.77.0.1", 29500, False, LIMIT))
        for count, thread in enumerate(threads[1:], 1):
            wait_until(lambda count=count: store.find(rollcall._key(count)) is not None)
            thread.start()
        for thread in threads:
            thread.join()
    assert str(said.pop("before")) == (
        f"the line for 10.77.0.1:29500 was started once more on {socket.gethostname()} (10.77.0.2), and that one "
        "counts: one on each machine"
    )
    numbers = {name: roll.number for name, roll in said.items() if isinstance(roll, Roll)}
    assert numbers == {"first": 0, "again": 1, "last": 2}
