"""How the ranks of a cluster become processes: on this machine here, on many in `launch.joining`."""

import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from expertmesh.launch.channel import Channel
from expertmesh.launch.forkserver import ForkServer, Process

LOOPBACK = "127.0.0.1"
Spec = dict[str, Any]


@dataclass
class Member:
    """A rank as its driver sees it: where it runs, and the channel to it. process: where the driver may end it."""

    rank: int
    host: str
    pid: int
    channel: Channel
    process: Process | None

    def wait(self, timeout: float) -> int | None:
        """Its exit status, -N after signal N; None while it runs, and where another machine knows that alone."""
        return self.process.wait(timeout) if self.process else None

    def kill(self) -> None:
        """End it by force, where that can be done from here."""
        if self.process:
            self.process.kill(signal.SIGKILL)


class Launcher(Protocol):
    """Starts ranks as processes. nodes, cards: how many there are, where that is not for the driver to choose. apart:
    the ranks are not all on the driver's machine (or behave so): they speak for themselves when the cluster ends, and
    end by themselves when they do not hear the driver any more. rate: bits/s of a node's link, where that is known.
    sharing: how many ranks share a machine, its cores and its memory; None: all of them."""

    nodes: int | None
    cards: int | None
    apart: bool
    rate: float | None
    sharing: int | None

    def start(self, program: str, specs: Sequence[Spec], timeout: float) -> list[Member]:
        """Every rank calls "package.module:function" with its spec and its channel. RankFailure names those that did
        not come within `timeout` seconds. Only once."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...


class Here:
    """All ranks on this machine, forked from one process. Implements `Launcher`."""

    nodes: int | None = None
    cards: int | None = None
    apart = False
    rate: float | None = None
    sharing: int | None = None

    def __init__(
        self, preload: Sequence[str], server: ForkServer | None = None, address: str = LOOPBACK
    ) -> None:
        """server: whose children the ranks become; with one of its own, the launcher ends it too. address: of the
        interface by which ranks of different nodes reach each other."""
        self._address = address
        self._server = server or ForkServer(preload)
        self._own = server is None

    def start(self, program: str, specs: Sequence[Spec], timeout: float) -> list[Member]:
        processes = self._server.start(program, [{"address": self._address} | spec for spec in specs])
        host = socket.gethostname()
        return [Member(rank, host, p.pid, p.channel, p) for rank, p in enumerate(processes)]

    def close(self) -> None:
        if self._own:
            self._server.close()
