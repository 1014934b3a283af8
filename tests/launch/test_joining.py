"""Ranks that come over a network: all find their place, strangers hold up nobody, and who does not come is named."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from expertmesh.errors import InputError, RankFailure
from expertmesh.launch import joining
from expertmesh.launch.channel import HEADER, Channel, ChannelClosed
from expertmesh.launch.joining import Arrival, Reception, join, serve, software

pytestmark = pytest.mark.timeout(120)

LIMIT = 60.0
HOST = socket.gethostname()


@pytest.fixture
def reception() -> Iterator[Reception]:
    found = Reception("127.0.0.1", "token")
    yield found
    found.close()


@pytest.fixture
def come(reception: Reception) -> Iterator[Callable[[int], Channel]]:
    """A rank's end of its channel."""
    with ExitStack() as stack:

        def call(rank: int, token: str = "token") -> Channel:
            channel = join(("127.0.0.1", reception.port), token, rank, LIMIT)
            stack.callback(channel.close)
            return channel

        yield call


def receive(
    reception: Reception, ranks: int, timeout: float = LIMIT, ended: str | None = None
) -> list[Arrival]:
    return reception.receive(ranks, timeout, lambda: ended, lambda rank: f"rank {rank}")


def problem(reception: Reception, ranks: int, timeout: float = LIMIT, ended: str | None = None) -> str:
    with pytest.raises(RankFailure) as caught:
        receive(reception, ranks, timeout, ended)
    return str(caught.value)


def told(channel: Channel, rank: int) -> str:
    """What a rank hears that has come for nothing."""
    with pytest.raises(RankFailure) as caught:
        serve(channel, rank, LIMIT, {})
    return str(caught.value)


def heard(channel: Channel) -> Any:
    channel.bound_receiving(LIMIT)
    return channel.receive()


def test_ranks_are_put_in_order(reception: Reception, come: Callable[[int], Channel]) -> None:
    channels = {rank: come(rank) for rank in (2, 0, 3, 1)}
    found = receive(reception, 4)
    assert [(a.rank, a.host, a.pid) for a in found] == [(rank, HOST, os.getpid()) for rank in range(4)]
    for arrival in found:
        arrival.channel.send([arrival.rank, bytes(10_000)])  # more than of somebody unknown is read
        channels[arrival.rank].send(bytes(10_000))
        assert heard(channels[arrival.rank])[0] == arrival.rank and len(heard(arrival.channel)) == 10_000
        arrival.channel.close()


def test_strangers_hold_up_nobody(reception: Reception, come: Callable[..., Channel]) -> None:
    """Silent ones, and such as say anything but what they should."""
    words = [b""] * 30 + [
        b"GET / HTTP/1.0\r\n\r\n", HEADER.pack(1 << 31), HEADER.pack(5) + b"\xc1" * 5, HEADER.pack(1) + b"\x05",
        HEADER.pack(2) + b"\x91\x05", HEADER.pack(3) + b"\x81\x05\x05", HEADER.pack(400) + b"half", b"\0",
    ]  # fmt: skip
    with ExitStack() as stack:
        for word in words:
            caller = stack.enter_context(socket.create_connection((reception.address, reception.port)))
            caller.sendall(word)
        stack.enter_context(socket.create_connection((reception.address, reception.port))).close()
        wrong = come(0, "nekot")
        channels = [come(rank) for rank in range(2)]
        for arrival in receive(reception, 2, timeout=20):
            arrival.channel.send("welcome")
            arrival.channel.close()
        assert [heard(channel) for channel in channels] == ["welcome"] * 2
        with pytest.raises(ChannelClosed):
            heard(wrong)


def test_a_stranger_that_never_comes_to_an_end_holds_up_nobody(
    reception: Reception, come: Callable[..., Channel]
) -> None:
    """It says one more letter again and again, for longer than the others have time to come."""
    there = threading.Event()
    with socket.create_connection((reception.address, reception.port)) as caller:
        caller.sendall(HEADER.pack(4000) + b"x")

        def drip() -> None:
            for _ in range(100):
                if there.wait(0.3):
                    return
                caller.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        for rank in range(2):
            come(rank)
        for arrival in receive(reception, 2, timeout=20):
            arrival.channel.close()
        there.set()
        dripping.join()


def test_of_two_of_the_same_rank_the_first_one_stays(
    reception: Reception, come: Callable[[int], Channel]
) -> None:
    """And one of more ranks than there are is turned away."""
    channels = [come(rank) for rank in (1, 1, 7, 0)]
    for arrival in receive(reception, 2):
        arrival.channel.send("welcome")
        arrival.channel.close()
    for number in (0, 3):
        assert heard(channels[number]) == "welcome"
    for number in (1, 2):
        with pytest.raises(ChannelClosed):
            heard(channels[number])


def test_another_software_is_named_on_all_sides(
    reception: Reception, come: Callable[[int], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = software()
    first = come(0)
    monkeypatch.setattr(joining, "software", lambda: ours | {"torch": "1.0"})
    other = come(1)
    monkeypatch.setattr(joining, "software", lambda: ours)
    text = problem(reception, 3)
    assert re.fullmatch(
        rf"rank 1 on {HOST} runs python \S+, expertmesh \S+, torch 1\.0, the driver on {HOST} python .*torch "
        rf"{re.escape(ours['torch'])}; install the same on all machines",
        text,
    )
    assert told(first, 0) == f"rank 0 on {HOST} ends: {text}"
    assert told(other, 1) == f"rank 1 on {HOST} ends: {text}"


def test_ranks_that_do_not_come_are_named_also_to_those_that_have(
    reception: Reception, come: Callable[[int], Channel]
) -> None:
    channels = {rank: come(rank) for rank in (1, 6)}
    text = problem(reception, 8, timeout=0.3)
    assert text == (
        f"rank 0, rank 2, rank 3, rank 4 and 2 more did not come within 0.3 s: the driver on {HOST} waits at "
        f"127.0.0.1:{reception.port}; 2 of 8 ranks are there"
    )
    for rank, channel in channels.items():
        assert told(channel, rank) == f"rank {rank} on {HOST} ends: {text}"


def test_what_has_ended_is_not_waited_for(reception: Reception, come: Callable[[int], Channel]) -> None:
    channel = come(1)
    assert problem(reception, 2, ended=None, timeout=0.3).startswith("rank 0 did not come")
    assert told(channel, 1).startswith(f"rank 1 on {HOST} ends: rank 0 did not come")
    assert problem(reception, 2, ended="rank 0 ended with status 3") == "rank 0 ended with status 3"


def test_a_rank_that_waits_loses_its_driver(reception: Reception, come: Callable[[int], Channel]) -> None:
    channel = come(0)
    (arrival,) = receive(reception, 1)
    arrival.channel.close()
    assert told(channel, 0).startswith(f"rank 0 on {HOST} waited for the other ranks, and lost the driver: ")


def test_a_rank_runs_no_other_programs(reception: Reception, come: Callable[[int], Channel]) -> None:
    channel = come(0)
    (arrival,) = receive(reception, 1)
    arrival.channel.send({"program": "os:system", "spec": {}})
    assert told(channel, 0) == "the driver asks for 'os:system', which no rank runs"
    arrival.channel.close()


def test_a_driver_that_is_not_there_yet_is_waited_for(reception: Reception) -> None:
    port = reception.port
    reception.close()
    later: list[Reception] = []

    def host() -> None:
        time.sleep(0.5)
        found = Reception("127.0.0.1", "token")
        found._socket.close()
        found._socket = socket.create_server(("127.0.0.1", port))
        later.append(found)

    thread = threading.Thread(target=host)
    thread.start()
    join(("127.0.0.1", port), "token", 0, LIMIT).close()
    thread.join()
    later[0].close()


def test_a_driver_that_nobody_hosts(reception: Reception) -> None:
    reception.close()
    with pytest.raises(RankFailure) as caught:
        join(("127.0.0.1", reception.port), "token", 3, 0.5)
    assert str(caught.value) == (
        f"rank 3 on {HOST} cannot reach the driver at 127.0.0.1:{reception.port} within 0.5 s: Connection refused"
    )


def test_an_address_of_another_machine() -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1 is no address of this machine: "):
        Reception("192.0.2.1")
