"""Ranks that come to their driver over a network: where they call, and who does not come."""

import contextlib
import importlib
import os
import platform
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from expertmesh.errors import InputError, RankFailure
from expertmesh.launch.channel import Channel, ChannelClosed, FirstMessage
from expertmesh.launch.descriptors import allow_files
from expertmesh.launch.interfaces import interface_address
from expertmesh.launch.launcher import Spec

FIRST_MESSAGE = 4096  # bytes: more is not read of who may be a stranger
# What a driver may let a rank run.
PROGRAMS = ("expertmesh.engine.worker:serve_rank", "expertmesh.bench.exchange:serve_rank")
RETRY = 0.2  # seconds


def software() -> dict[str, str]:
    """What has to be the same on all machines of a cluster."""
    found = {"python": platform.python_version()}
    return found | {name: version(name) for name in ("expertmesh", "torch")}


@dataclass(frozen=True)
class Arrival:
    """A rank that has come."""

    rank: int
    host: str
    pid: int
    channel: Channel


class Reception:
    """Where the ranks call, on the driver's machine."""

    def __init__(self, address: str, token: str | None = None) -> None:
        """InputError where the address is none of this machine's."""
        self.token = token or secrets.token_hex(16)
        self._socket = socket.socket()
        try:
            self._socket.bind((address, 0))
        except OSError as error:
            self._socket.close()
            raise InputError(f"{address} is no address of this machine: {error.strerror}") from None
        self._socket.listen(4096)
        self.address, self.port = self._socket.getsockname()

    def receive(
        self, ranks: int, timeout: float, ended: Callable[[], str | None], name: Callable[[int], str]
    ) -> list[Arrival]:
        """All ranks, in their order. RankFailure names those that have not come in time, also to those that have.
        InputError: there may not be so many connections.

        ended: what has ended meanwhile of those that were started from here, if anything. name: of a rank in messages.
        """
        allow_files(ranks)
        found: dict[int, Arrival] = {}
        end = time.monotonic() + timeout
        # Of whom nobody knows yet who they are. All are heard side by side: whatever they say, they hold up nobody.
        callers: set[socket.socket] = set()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ, None)
                while len(found) < ranks:
                    left = end - time.monotonic()
                    problem = ended() or (_absent(ranks, found, timeout, name, self) if left <= 0 else None)
                    for event, _ in [] if problem else selector.select(min(left, RETRY)):
                        connection, first = event.fileobj, event.data
                        assert isinstance(connection, socket.socket)
                        if first is None:
                            caller, _ = connection.accept()
                            callers.add(caller)
                            selector.register(
                                caller, selectors.EVENT_READ, FirstMessage(caller, FIRST_MESSAGE)
                            )
                            continue
                        if first.comes():
                            continue
                        selector.unregister(connection)
                        callers.discard(connection)
                        arrival = self._who(connection, first)
                        if isinstance(arrival, str):
                            problem = arrival
                        elif arrival is not None and arrival.rank < ranks and arrival.rank not in found:
                            found[arrival.rank] = arrival
                        elif arrival is not None:
                            arrival.channel.close()
                    if problem:
                        dismiss(list(found.values()), problem)
                        raise RankFailure(problem)
        finally:
            for caller in callers:
                caller.close()
        return [found[rank] for rank in range(ranks)]

    def close(self) -> None:
        self._socket.close()

    def _who(self, connection: socket.socket, first: FirstMessage) -> Arrival | str | None:
        """Who has called; None for a stranger, a message for a rank that does not fit to this driver."""
        try:
            hello = first.content()
            if not secrets.compare_digest(str(hello["token"]), self.token):
                raise ValueError("a wrong token")
            rank, host, pid, theirs = hello["rank"], hello["host"], hello["pid"], hello["software"]
        except (ValueError, KeyError, TypeError):
            connection.close()
            return None
        arrival = Arrival(rank, host, pid, Channel(connection))
        if theirs != (ours := software()):
            why = (
                f"rank {rank} on {host} runs {_listed(theirs)}, the driver on {socket.gethostname()} {_listed(ours)}; "
                "install the same on all machines"
            )
            dismiss([arrival], why)
            return why
        return arrival


def dismiss(arrivals: list[Arrival], why: str) -> None:
    """Tell ranks that have come why there is nothing to do."""
    for arrival in arrivals:
        with contextlib.suppress(ChannelClosed):
            arrival.channel.send({"because": why})
        arrival.channel.close()


def _absent(
    ranks: int, found: dict[int, Arrival], timeout: float, name: Callable[[int], str], reception: Reception
) -> str:
    absent = [rank for rank in range(ranks) if rank not in found]
    more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
    return (
        f"{', '.join(name(rank) for rank in absent[:4])}{more} did not come within {timeout:g} s: the driver on "
        f"{socket.gethostname()} waits at {reception.address}:{reception.port}; {len(found)} of {ranks} ranks are there"
    )


def _listed(software: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in dict(software).items())


def join(address: tuple[str, int], token: str, rank: int, timeout: float, source: str = "") -> Channel:
    """Come to the driver as this rank; source: address of the interface to take. RankFailure where it cannot be
    reached within `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(address, max(0.1, end - time.monotonic()), (source, 0))
            break
        except OSError as error:
            if time.monotonic() + RETRY > end:
                raise RankFailure(
                    f"rank {rank} on {socket.gethostname()} cannot reach the driver at {address[0]}:{address[1]} "
                    f"within {timeout:g} s: {error.strerror or error}"
                ) from None
            time.sleep(RETRY)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel = Channel(connection)
    hello = {
        "token": token,
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "software": software(),
    }
    channel.send(hello)
    return channel


def come(spec: Spec, _: Channel) -> None:
    """A process that was forked to be a rank: go to the driver, and do what it says. Of the spec: driver, token, rank,
    timeout, and interface where one is to be taken. It exits with 1 where that does not work, and says why."""
    try:
        source = interface_address(spec["interface"]) if spec.get("interface") else ""
        channel = join(tuple(spec["driver"]), spec["token"], spec["rank"], spec["timeout"], source)
        serve(channel, spec["rank"], spec["timeout"], {})
    except (RankFailure, InputError) as error:
        os.write(2, f"expertmesh: {error}\n".encode())  # in one piece: others speak at the same time
        sys.exit(1)


def serve(channel: Channel, rank: int, timeout: float, local: Spec) -> None:
    """Do what the driver has this rank do, until it ends this process. local: what this machine says of the spec.
    RankFailure where the driver has no use for it."""
    try:
        channel.bound_receiving(2 * timeout)
        order = channel.receive()
        channel.bound_receiving(0.0)
    except ChannelClosed as error:
        raise RankFailure(
            f"rank {rank} on {socket.gethostname()} waited for the other ranks, and lost the driver: {error}"
        ) from None
    if "because" in order:
        raise RankFailure(f"rank {rank} on {socket.gethostname()} ends: {order['because']}")
    if order["program"] not in PROGRAMS:
        raise RankFailure(f"the driver asks for {order['program']!r}, which no rank runs")
    module, _, function = order["program"].partition(":")
    spec = order["spec"] | {"address": channel.address} | local
    getattr(importlib.import_module(module), function)(spec, channel)
