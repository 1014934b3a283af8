"""Ranks as the processes that torchrun (or any launcher that sets its variables) has started, on one machine or many.

The process of rank 0 is the driver, which starts rank 0 beside it; every other process is a rank.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from expertmesh.errors import InputError, RankFailure
from expertmesh.launch.crew import name_of
from expertmesh.launch.forkserver import ForkServer
from expertmesh.launch.interfaces import interface_address, interfaces, is_loopback
from expertmesh.launch.joining import RETRY, Reception, join, serve
from expertmesh.launch.launcher import Member, Spec
from expertmesh.launch.store import ATTEMPT, Store
from expertmesh.mesh.topology import Topology

LAST_WORD = 1.0  # seconds
PR_SET_PDEATHSIG = 1
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Assignment:
    """Which rank of which cluster this process is, as torchrun says it."""

    rank: int
    ranks: int
    cards: int
    store: tuple[str, int]
    elastic: bool  # started by torch's elastic launcher, which tells its processes to end, and has a store for them
    run: str  # a name of this cluster
    restarts: int  # how often it has been started again

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Assignment | None":
        """None without these variables. InputError where the machines have different numbers of processes."""
        if any(name not in environment for name in NAMES):
            return None
        rank, ranks, _, cards, _, port = (
            0 if name == "MASTER_ADDR" else int(environment[name]) for name in NAMES
        )
        if ranks % cards:
            raise InputError(
                f"{ranks} ranks in all, but {cards} on this machine: start as many on each (--nproc-per-node)"
            )
        return Assignment(
            rank, ranks, cards, (environment["MASTER_ADDR"], port),
            elastic=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            run=environment.get("TORCHELASTIC_RUN_ID", ""),
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{name_of(self.rank, self.topology)} on {socket.gethostname()}"

    @property
    def topology(self) -> Topology:
        return Topology(self.ranks // self.cards, self.cards)

    def connect(self, timeout: float) -> Store:
        """The store where the processes find each other."""
        try:
            return Store(*self.store, hosts=self.rank == 0 and not self.elastic, timeout=timeout)
        except RankFailure as error:
            raise RankFailure(f"{self}: {error}") from None

    @property
    def call(self) -> str:
        """The key of where the driver is. After a restart it may hold, for a moment, where the driver was before: not
        all machines count restarts alike."""
        return f"expertmesh/{self.run}/call"

    @property
    def farewell(self) -> str:
        """The key of why there is no driver any more, of one that never called."""
        return f"expertmesh/{self.run}/farewell/{self.restarts}"


class Torchrun:
    """The driver, in the process of rank 0. Implements `Launcher`."""

    apart = True
    rate: float | None = None

    def __init__(self, own: Assignment, preload: Sequence[str], interface: str | None) -> None:
        self.nodes: int | None = own.topology.nodes
        self.cards: int | None = own.cards
        self.sharing: int | None = own.cards
        self._own = own
        self._reception = Reception(own_address(own.store[0], interface, self.nodes))
        self._server = ForkServer(preload)

    def start(self, program: str, specs: Sequence[Spec], timeout: float) -> list[Member]:
        reception, topology = self._reception, self._own.topology
        call = {"driver": [reception.address, reception.port], "token": reception.token}
        self._store = self._own.connect(timeout)
        self._store.set(self._own.call, json.dumps(call))
        (first,) = self._server.start(
            "expertmesh.launch.joining:come", [call | {"rank": 0, "timeout": timeout}]
        )

        def ended() -> str | None:
            status = first.poll()
            return (
                None
                if status is None
                else f"{name_of(0, topology)} ended with status {status} before all ranks were there"
            )

        arrivals = reception.receive(len(specs), timeout, ended, lambda rank: name_of(rank, topology))
        for arrival, spec in zip(arrivals, specs, strict=True):
            arrival.channel.send({"program": program, "spec": spec})
        return [Member(a.rank, a.host, a.pid, a.channel, first if a.rank == 0 else None) for a in arrivals]

    def close(self) -> None:
        self._reception.close()
        self._server.close()


@contextlib.contextmanager
def leading(own: Assignment) -> Iterator[None]:
    """In the process of rank 0: what ends it before it has called the others is told to them."""
    if own.elastic:
        signal.signal(signal.SIGTERM, _soon)
    try:
        yield
    except BaseException as error:
        if own.elastic:  # else the store ends with this process
            with contextlib.suppress(RankFailure, InputError):
                why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
                own.connect(LAST_WORD).set(own.farewell, json.dumps({"because": why or repr(error)}))
        raise


def _soon(number: int, _: object) -> None:
    """A rank of this machine that fails makes the launcher end this process at once. In a moment it will know by
    itself what has happened, and say it."""
    timer = threading.Timer(LAST_WORD, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


def work(own: Assignment, timeout: float, interface: str | None, local: Spec) -> None:
    """Any other rank, until the driver ends this process. RankFailure where it does not come to that."""
    _heed_signals(own)
    store = own.connect(timeout)
    source = interface_address(interface) if interface else ""
    end = time.monotonic() + timeout
    while True:
        text = store.wait([own.farewell, own.call], timeout)
        if text is None:
            raise RankFailure(
                f"{own} waited {timeout:g} s for the driver, the process of rank 0, to say at "
                f"{own.store[0]}:{own.store[1]} where it is"
            )
        call = json.loads(text)
        if "because" in call:
            raise RankFailure(f"{own} ends: the driver, the process of rank 0, has ended: {call['because']}")
        left = end - time.monotonic()
        try:
            channel = join(
                tuple(call["driver"]), call["token"], own.rank, max(RETRY, min(left, ATTEMPT)), source
            )
            break
        except RankFailure:
            if left < ATTEMPT:
                raise
    serve(channel, own.rank, timeout, local)


class _Told(RankFailure):
    """This process was told to end: as a rule because another one has failed."""

    suspects: tuple[int, ...] = ()


def _heed_signals(own: Assignment) -> None:
    """The driver hears Ctrl-C too, and ends all. Where it is on another machine, it has to be told."""

    def tell(number: int, _: object) -> None:
        raise _Told(f"{signal.Signals(number).name} told it to end")

    for number in (signal.SIGINT, signal.SIGTERM) if own.elastic else (signal.SIGINT,):
        signal.signal(number, tell if own.rank >= own.cards else signal.SIG_IGN)


def end_with_parent() -> None:
    """This process is killed when the one that has started it ends, in whatever way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def own_address(master: str, interface: str | None, nodes: int | None) -> str:
    """The address of this machine where the ranks of others reach the driver. InputError where it has to be named."""
    if interface is not None:
        return interface_address(interface)
    try:
        address = socket.gethostbyname(master)
    except OSError as error:
        raise InputError(f"the name {master} has no address: {error.strerror or error}") from None
    if nodes == 1 or not is_loopback(address):
        return address
    found = {name: own for name, own in interfaces().items() if not is_loopback(own)}
    if len(found) != 1:
        listed = ", ".join(f"{name} ({own})" for name, own in found.items()) or "none is up"
        raise InputError(
            f"{master} is {address} here, which no other machine reaches; say --interface, of: {listed}"
        )
    return next(iter(found.values()))
