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
from expertmesh.launch.channel import Channel
from expertmesh.launch.forkserver import ForkServer, Process
from expertmesh.launch.joining import Reception, join, serve
from expertmesh.launch.launcher import Member, Spec

VARIABLE = "EXPERTMESH_CLUSTER"


class Emulated:
    """The cluster of `expertmesh emulate`, whose first node this process is in. Implements `Launcher`."""

    apart = True

    def __init__(
        self,
        nodes: Sequence[Node],
        cards: int,
        rate: float | None,
        kills: Sequence[tuple[int, float]],
        preload: Sequence[str],
    ) -> None:
        """rate: of each node's link, in bits/s; kills: ranks to kill, and how many seconds after this process has
        started."""
        self.rate = rate
        self.nodes: int | None = len(nodes)
        self.cards: int | None = cards
        self._nodes, self._kills = nodes, kills
        self._server = ForkServer(preload)
        self._reception = Reception(nodes[0].address)

    @staticmethod
    def of(environment: Mapping[str, str], preload: Sequence[str]) -> "Emulated | None":
        """The cluster that the environment names, if any."""
        if VARIABLE not in environment:
            return None
        found = json.loads(environment[VARIABLE])
        kills = [(int(rank), float(seconds)) for rank, seconds in found["kill"]]
        return Emulated(
            [Node(**node) for node in found["nodes"]], found["cards"], found.get("rate"), kills, preload
        )

    def start(self, program: str, specs: Sequence[Spec], timeout: float) -> list[Member]:
        cards, reception = self.cards or 1, self._reception
        homes = [self._nodes[rank // cards] for rank in range(len(specs))]
        common = {"driver": [reception.address, reception.port], "token": reception.token, "timeout": timeout}
        processes = self._server.start(
            "expertmesh.emulation.spread:come",
            [
                common | {"rank": rank, "namespace": home.namespace, "host": home.host}
                for rank, home in enumerate(homes)
            ],
        )
        self._schedule(processes)

        def name(rank: int) -> str:
            return f"rank {rank} (node {rank // cards}, card {rank % cards}) on {homes[rank].host}"

        def ended() -> str | None:
            statuses = {rank: p.poll() for rank, p in enumerate(processes)}
            dead = [(rank, status) for rank, status in statuses.items() if status is not None]
            return (
                f"{name(dead[0][0])} ended with status {dead[0][1]} before all ranks were there"
                if dead
                else None
            )

        arrivals = reception.receive(len(specs), timeout, ended, name)
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


def come(spec: Spec, _: Channel) -> None:
    """One rank: into its namespace, to its driver."""
    enter(spec["namespace"], spec["host"])
    channel = join(tuple(spec["driver"]), spec["token"], spec["rank"], spec["timeout"])
    serve(channel, spec["rank"], spec["timeout"], {})
