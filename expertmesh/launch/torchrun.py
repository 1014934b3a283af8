"""Ranks as the processes that torchrun (or any launcher that sets its variables) has started, on one machine or many.

The process of rank 0 is the driver, which starts rank 0 beside it; every other process is a rank.
"""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from expertmesh.errors import InputError, RankFailure
from expertmesh.launch.channel import Channel
from expertmesh.launch.forkserver import ForkServer
from expertmesh.launch.interfaces import interface_address, interfaces, is_loopback
from expertmesh.launch.joining import Reception, join, serve
from expertmesh.launch.launcher import Member, Spec

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Which rank of which cluster this process is, as torchrun says it."""

    rank: int
    ranks: int
    cards: int
    store: tuple[str, int]
    hosts_store: bool
    generation: str  # of this start of the cluster: restarts have another one

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Place | None":
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
        return Place(
            rank, ranks, cards, (environment["MASTER_ADDR"], port),
            hosts_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            generation="/".join(environment.get(f"TORCHELASTIC_{n}", "") for n in ("RUN_ID", "RESTART_COUNT")),
        )  # fmt: skip

    def connect(self, timeout: float) -> TCPStore:
        """The store where the processes find each other."""
        host, port = self.store
        try:
            return TCPStore(
                host,
                port,
                is_master=self.hosts_store,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise RankFailure(
                f"rank {self.rank} on {socket.gethostname()} cannot "
                f"{'open' if self.hosts_store else 'reach'} the store at {host}:{port} within {timeout:g} s: "
                f"{str(error).splitlines()[0]}"
            ) from None

    @property
    def key(self) -> str:
        return f"expertmesh/{self.generation}"


class Torchrun:
    """The driver, in the process of rank 0. Implements `Launcher`."""

    apart = True
    rate: float | None = None

    def __init__(self, place: Place, preload: Sequence[str], interface: str | None) -> None:
        self.nodes: int | None = place.ranks // place.cards
        self.cards: int | None = place.cards
        self._place = place
        self._server = ForkServer(preload)
        self._reception = Reception(own_address(place.store[0], interface, self.nodes))

    def start(self, program: str, specs: Sequence[Spec], timeout: float) -> list[Member]:
        reception = self._reception
        call = {"driver": [reception.address, reception.port], "token": reception.token}
        self._store = self._place.connect(timeout)
        self._store.set(self._place.key, json.dumps(call))
        (first,) = self._server.start("expertmesh.launch.torchrun:come", [call | {"timeout": timeout}])

        def name(rank: int) -> str:
            node, card = divmod(rank, self._place.cards)
            return f"rank {rank} (node {node}, card {card})"

        def ended() -> str | None:
            status = first.poll()
            return (
                None
                if status is None
                else f"{name(0)} ended with status {status} before all ranks were there"
            )

        arrivals = reception.receive(len(specs), timeout, ended, name)
        for arrival, spec in zip(arrivals, specs, strict=True):
            arrival.channel.send({"program": program, "spec": spec})
        return [Member(a.rank, a.host, a.pid, a.channel, first if a.rank == 0 else None) for a in arrivals]

    def close(self) -> None:
        self._reception.close()
        self._server.close()


def come(spec: Spec, _: Channel) -> None:
    """Rank 0, beside the driver."""
    channel = join(tuple(spec["driver"]), spec["token"], 0, spec["timeout"])
    serve(channel, 0, spec["timeout"], {})


def work(place: Place, timeout: float, interface: str | None, local: Spec) -> None:
    """Any other rank, until the driver ends this process. RankFailure where it does not come to that."""
    store = place.connect(timeout)
    try:
        call = json.loads(store.get(place.key))
    except RuntimeError:
        raise RankFailure(
            f"rank {place.rank} on {socket.gethostname()} waited {timeout:g} s for the driver, the process of rank 0, "
            f"to say at {place.store[0]}:{place.store[1]} where it is"
        ) from None
    source = interface_address(interface) if interface else ""
    channel = join(tuple(call["driver"]), call["token"], place.rank, timeout, source)
    serve(channel, place.rank, timeout, local)


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
