"""A cluster of machines on one machine: network namespaces joined by links of a given rate and delay."""

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from expertmesh.emulation.bridge import Bridge, can_delay
from expertmesh.emulation.links import MTU, shaped
from expertmesh.emulation.namespaces import configure, create, inside
from expertmesh.emulation.switch import Switch
from expertmesh.errors import InputError

INTERFACE = "eth0"
LARGEST = 128  # machines; each takes a few descriptors, of which a process may hold 1024
TOOLS = ("ip", "tc", "bridge")
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
NOT_ALLOWED = "run it as root (in a container also with the capabilities NET_ADMIN and SYS_ADMIN)"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. `namespace` is the path of its network, for `namespaces.enter`; any process of the user
    can open it while the cluster is there."""

    number: int
    host: str
    address: str
    interface: str
    namespace: str


def require() -> None:
    """InputError where no cluster can be emulated: what is missing, and what to do."""
    if not sys.platform.startswith("linux"):
        raise InputError(f"a cluster can be emulated on Linux only, and this is {sys.platform}")
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        raise InputError(f"to emulate a cluster takes the program {', '.join(missing)}: install iproute2")
    held = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    lacking = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        raise InputError(f"to emulate a cluster takes {' and '.join(lacking)}: {NOT_ALLOWED}")


class EmulatedCluster:
    """Machines that reach each other and nothing else.

    Each is a network namespace with an interface of its own. `rate` (bits/s, 0 for none) holds for what each sends and
    for what each receives; `delay` (seconds, 0 for none) is what a packet takes from one to another. Without `netem`
    in the kernel, a delay takes a switch that is a process (see `emulation.switch`).

    It lasts until `close`, or until this process ends in whatever way and with it all that are in its namespaces.
    InputError: it cannot be made here.
    """

    def __init__(self, nodes: int, rate: int = 0, delay: float = 0.0) -> None:
        if not 1 <= nodes <= LARGEST:
            raise InputError(f"nodes is {nodes}, but must be from 1 to {LARGEST}")
        require()
        with ExitStack() as unless_made:
            try:
                self._build(nodes, rate, delay, unless_made)
            except OSError as error:
                advice = f": {NOT_ALLOWED}" if isinstance(error, PermissionError) else ""
                raise InputError(f"no cluster can be emulated here ({error}){advice}") from None
            self._held = unless_made.pop_all()

    def cut(self, number: int) -> None:
        """From now on nothing comes to this machine or from it, and nobody is told: connections hang, links stay up."""
        self._fabric.cut(self.nodes[number].number)

    def close(self) -> None:
        """Let go of all namespaces. Those with processes in them stay until these end, without links where a process
        was the switch. Again: nothing."""
        self._held.close()

    @property
    def switch(self) -> int | None:
        """The pid of the process that is the switch, where there is one. Without it no machine reaches another."""
        return self._fabric.pid if isinstance(self._fabric, Switch) else None

    def __enter__(self) -> "EmulatedCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self, nodes: int, rate: int, delay: float, held: ExitStack) -> None:
        namespaces = []
        for _ in range(nodes):
            namespaces.append(create())
            held.callback(os.close, namespaces[-1])
        addresses = [f"02:00:0a:4d:00:{number + 1:02x}" for number in range(nodes)]
        kind = Switch if delay and not can_delay() else Bridge
        self._fabric: Bridge | Switch = kind(namespaces, addresses, rate, delay)
        held.callback(self._fabric.close)
        self.nodes = tuple(
            Node(n, f"node{n}", f"10.77.0.{n + 1}", INTERFACE, f"/proc/{os.getpid()}/fd/{namespaces[n]}")
            for n in range(nodes)
        )
        for node, namespace in zip(self.nodes, namespaces, strict=True):
            inside(namespace, partial(_connect, node, self.nodes, addresses, rate))


def _connect(node: Node, nodes: Sequence[Node], addresses: Sequence[str], rate: int) -> None:
    """Everybody knows everybody's address, so that nothing is sent and counted in order to find it out."""
    lines = [
        f"link set {INTERFACE} mtu {MTU}",
        f"address add {node.address}/24 dev {INTERFACE}",
        f"link set {INTERFACE} up",
    ]
    for other in nodes:
        if other != node:
            hardware = addresses[other.number]
            lines.append(f"neighbour add {other.address} lladdr {hardware} nud permanent dev {INTERFACE}")
    configure("ip", lines)
    if rate:
        configure("tc", [shaped(INTERFACE, rate)])
