"""Ranks in the network namespaces of an emulated cluster: forked from one process, they come to their driver over the
emulated network, as those of other machines do."""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence

import psutil

from expertmesh.emulation.cluster import Node
from expertmesh.emulation.namespaces import enter
from expertmesh.errors import RankFailure
from expertmesh.launch import joining
from expertmesh.launch.channel import Channel
from expertmesh.launch.crew import name_of
from expertmesh.launch.forkserver import ForkServer, Process
from expertmesh.launch.interfaces import interface_address
from expertmesh.launch.joining import Reception
from expertmesh.launch.launcher import Member, Spec
from expertmesh.mesh.topology import Topology

VARIABLE = "EXPERTMESH_CLUSTER"
LAST_WORD = 1.0  # seconds


class Emulated:
    """The cluster of `expertmesh emulate`, whose first node this process is in. Implements `Launcher`."""

    apart = True
    sharing: int | None = None

    def __init__(
        self,
        nodes: Sequence[Node],
        cards: int,
        rate: float | None,
        kills: Sequence[tuple[int, float]],
        preload: Sequence[str],
        interface: str | None = None,
    ) -> None:
        """rate: of each node's link, in bits/s; kills: ranks to kill, and how many seconds after this process has
        started; interface: of every node, to take instead of the link's. InputError where there is none such."""
        self.rate = rate
        self.nodes: int | None = len(nodes)
        self.cards: int | None = cards
        self._nodes, self._kills, self._interface = nodes, kills, interface
        self._reception = Reception(interface_address(interface) if interface else nodes[0].address)
        self._server = ForkServer(preload)

    @staticmethod
    def is_named(environment: Mapping[str, str]) -> bool:
        return VARIABLE in environment

    @staticmethod
    def of(
        environment: Mapping[str, str], preload: Sequence[str], interface: str | None = None
    ) -> "Emulated | None":
        """The cluster that the environment names, if any."""
        if not Emulated.is_named(environment):
            return None
        found = json.loads(environment[VARIABLE])
        kills = [(int(rank), float(seconds)) for rank, seconds in found["kill"]]
        nodes = [Node(**node) for node in found["nodes"]]
        return Emulated(nodes, found["cards"], found.get("rate"), kills, preload, interface)

    def start(self, program: str, specs: Sequence[Spec], timeout: float) -> list[Member]:
        topology, reception = Topology(len(self._nodes), self.cards or 1), self._reception
        homes = [self._nodes[topology.node_of(rank)] for rank in range(len(specs))]
        common = {
            "driver": [reception.address, reception.port],
            "token": reception.token,
            # The driver is the one to say who has not come: it knows of all.
            "timeout": timeout + LAST_WORD / 2,
            "interface": self._interface,
        }
        processes = self._server.start(
            "expertmesh.emulation.spread:come",
            [
                common | {"rank": rank, "namespace": home.namespace, "host": home.host}
                for rank, home in enumerate(homes)
            ],
        )
        self._schedule(processes)

        def name(rank: int) -> str:
            return f"{name_of(rank, topology)} on {homes[rank].host}"

        def ended() -> str | None:
            statuses = {rank: p.poll() for rank, p in enumerate(processes)}
            dead = [(rank, status) for rank, status in statuses.items() if status is not None]
            return (
                f"{name(dead[0][0])} ended with status {dead[0][1]} before all ranks were there"
                if dead
                else None
            )

        try:
            arrivals = reception.receive(len(specs), timeout, ended, name)
        except RankFailure:  # who starts the ranks ends them: not before they have said what they know of it
            end = time.monotonic() + LAST_WORD
            for process in processes:
                process.wait(max(0.0, end - time.monotonic()))
            raise
        for arrival, spec in zip(arrivals, specs, strict=True):
            arrival.channel.send({"program": program, "spec": spec})
        return [Member(a.rank, a.host, a.pid, a.channel, p) for a, p in zip(arrivals, processes, strict=True)]

    def close(self) -> None:
        self._reception.close()
        self._server.close()

    def _schedule(self, processes: Sequence[Process]) -> None:
        age = time.time() - psutil.Process(os.getpid()).create_time()
        for rank, seconds in self._kills:
            timer = threading.Timer(max(0.0, seconds - age), processes[rank].kill)
            timer.daemon = True
            timer.start()


def come(spec: Spec, channel: Channel) -> None:
    """One rank: into its namespace, to its driver."""
    enter(spec["namespace"], spec["host"])
    joining.come(spec, channel)
