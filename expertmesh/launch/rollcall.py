"""The machines of a cluster find each other: who is to be there comes, and is told so, or why it was for nothing."""

import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from expertmesh.errors import InputError, RankFailure
from expertmesh.launch.interfaces import interface_address, is_loopback, is_own
from expertmesh.launch.joining import software
from expertmesh.launch.store import LOOK, Store
from expertmesh.launch.torchrun import own_address

VERDICT, LEFT, COUNT = "roll/verdict", "roll/left", "roll/count"
BEAT = 0.5  # seconds between two signs of life of a machine that waits
GONE = 5.0  # seconds without one after which it is not counted, until there is another
LINGER = 2.0  # seconds that a store stays where the machines that have come may not have read why it ends


@dataclass(frozen=True)
class Machine:
    """What a machine says of itself: its name and address, and what has to be the same on all."""

    host: str
    address: str
    nodes: int
    cards: int
    software: dict[str, str]

    @staticmethod
    def read(said: str | None) -> "Machine":
        """InputError where that is not what a machine says."""
        try:
            found = json.loads(said or "")
            if {name: type(value) for name, value in found.items()} != SAYS:
                raise ValueError
            ipaddress.ip_address(found["address"])
        except (AttributeError, ValueError):
            raise InputError(
                f"a machine has come that says {said!r:.300}, which this expertmesh does not understand: install the "
                "same on all machines"
            ) from None
        return Machine(**found)

    @property
    def place(self) -> tuple[str, str]:
        """What no two machines have in common: there is one line on each."""
        return self.host, self.address

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


SAYS = {"host": str, "address": str, "nodes": int, "cards": int, "software": dict}


@dataclass(frozen=True)
class Roll:
    """All are there. number: of this machine among them, 0 for the one with the store; run: a name of this start of the
    cluster; store: lasts as long as its host keeps it."""

    number: int
    machines: list[Machine]
    run: str
    store: Store


@dataclass(frozen=True)
class Rendezvous:
    """Where the machines meet: a name or address of one of them, and a port of it."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> "Rendezvous":
        """InputError where it is not HOST:PORT."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(
                f"--join {text!r}: not of the form HOST:PORT, an address or name of one of the machines and a free port"
            )
        return Rendezvous(host, int(port))

    def call(self, nodes: int, cards: int, timeout: float, interface: str | None) -> Roll:
        """Wait for as many machines as there are nodes. RankFailure where they do not come within `timeout` seconds,
        to those that have come too; InputError where they do not fit together."""
        hosts = self._is_here(nodes)
        own = interface_address(interface) if interface else None
        try:
            store = Store(self.host, self.port, hosts, timeout)
        except RankFailure as error:
            raise RankFailure(
                f"{error}; one of the machines must have this address, and the same line must run there"
            ) from None
        address = own or (own_address(self.host, None, nodes) if hosts else store.address)
        mine = Machine(socket.gethostname(), address, nodes, cards, software())
        number = store.add(COUNT, 1)
        store.set(_key(number), json.dumps(asdict(mine)))
        verdict = (
            _preside(store, number, mine, str(self), timeout)
            if hosts
            else _listen(store, number, str(self), timeout)
        )
        if "order" not in verdict:
            store.add(LEFT, 1)
            if hosts:
                _linger(store)
            raise (InputError if verdict["wrong"] else RankFailure)(verdict["because"])
        machines = [Machine.read(store.find(_key(each))) for each in verdict["order"]]
        if number not in verdict["order"]:
            if mine.place in [machine.place for machine in machines]:
                raise InputError(
                    f"the line for {self} was started once more on {mine}, and that one counts: one on each machine"
                )
            raise InputError(
                f"--nodes {nodes}, and as many are at {self}: {_listed(machines)}; {mine} is one more"
            )
        return Roll(verdict["order"].index(number), machines, verdict["run"], store)

    def _is_here(self, nodes: int) -> bool:
        """Is it this machine that has the address?"""
        try:
            address = socket.gethostbyname(self.host)
        except OSError as error:
            raise InputError(f"--join {self}: {self.host} has no address here: {error.strerror}") from None
        if nodes > 1 and (self.host == "localhost" or _is_loopback_itself(self.host)):
            raise InputError(f"--join {self}: for each machine that is itself; name one that all reach")
        return is_own(address)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _preside(store: Store, own: int, mine: Machine, where: str, timeout: float) -> dict[str, Any]:
    """On the machine with the store: look who comes, and say what comes of it to all."""
    end = time.monotonic() + timeout
    attendance = _Attendance(store, own, mine)
    verdict: dict[str, Any] = {}
    while not verdict:
        try:
            came = attendance.look()
        except InputError as error:
            verdict = {"because": str(error), "wrong": True}
            break
        if differing := [text for machine in came.values() if (text := _difference(mine, machine))]:
            verdict = {"because": differing[0], "wrong": True}
        elif len(came) >= mine.nodes:
            others = sorted(came.keys() - {own})[: mine.nodes - 1]
            others.sort(key=lambda n: ipaddress.ip_address(came[n].address))
            verdict = {"order": [own, *others], "run": f"expertmesh-{secrets.token_hex(4)}"}
        elif time.monotonic() > end:
            verdict = {
                "because": f"{len(came)} of {mine.nodes} machines came to {where} within {timeout:g} s: "
                f"{_listed(came.values())}; start the same line on the others too",
                "wrong": False,
            }
        else:
            time.sleep(LOOK)
    store.set(VERDICT, json.dumps(verdict))
    return verdict


class _Attendance:
    """Who is there, as who presides sees it: a line that was interrupted does not count, nor does it twice when it was
    started again."""

    def __init__(self, store: Store, own: int, mine: Machine) -> None:
        self._store, self._own = store, own
        self._came = {own: mine}
        # Of each how many signs of life have been seen, and when the last one was.
        self._beats: dict[int, tuple[int, float]] = {}

    def look(self) -> dict[int, Machine]:
        """Their numbers. InputError where one says what cannot be understood."""
        store, now = self._store, time.monotonic()
        for number in range(1, store.add(COUNT, 0) + 1):
            if number not in self._came and (said := store.find(_key(number))) is not None:
                self._came[number] = Machine.read(said)
            beats = store.add(_beats(number), 0)
            if self._beats.get(number, (-1, now))[0] != beats:
                self._beats[number] = beats, now
        # Of the same place the last one, but for this one itself.
        last = {machine.place: number for number, machine in sorted(self._came.items())}
        last[self._came[self._own].place] = self._own
        return {
            number: self._came[number]
            for number in last.values()
            if number == self._own or now - self._beats[number][1] < GONE
        }


def _listen(store: Store, number: int, where: str, timeout: float) -> dict[str, Any]:
    """On any other machine. Who presides may have come later than this one, but not before it could be reached."""
    end = time.monotonic() + 2 * timeout
    while (text := store.wait([VERDICT], BEAT)) is None:
        if time.monotonic() > end:
            raise RankFailure(
                f"{socket.gethostname()} waited {2 * timeout:g} s at {where}, and nobody said for what"
            )
        store.add(_beats(number), 1)
    verdict: dict[str, Any] = json.loads(text)
    return verdict


def _linger(store: Store) -> None:
    """Until all that have come have read the verdict."""
    end = time.monotonic() + LINGER
    while store.add(LEFT, 0) < store.add(COUNT, 0) and time.monotonic() < end:
        time.sleep(LOOK)


def _difference(one: Machine, other: Machine) -> str | None:
    """What must be the same and is not."""
    for name in ("nodes", "cards"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            return f"--{name} is {ours} on {one} and {theirs} on {other}: start the same line on all machines"
    for name, version in one.software.items():
        if other.software.get(name) != version:
            return (
                f"{name} is {version} on {one} and {other.software.get(name)} on {other}: install the same on all "
                "machines"
            )
    return None


def _listed(machines: Iterable[Machine]) -> str:
    return ", ".join(map(str, machines))


def _key(number: int) -> str:
    return f"roll/{number}"


def _beats(number: int) -> str:
    return f"roll/{number}/beats"


def _is_loopback_itself(host: str) -> bool:
    try:
        return is_loopback(host)
    except ValueError:  # a name
        return False
