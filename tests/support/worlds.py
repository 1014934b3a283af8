"""Clusters whose ranks are threads of this process, and talk as threads or as processes do."""

import secrets
import threading
from collections.abc import Callable
from typing import TypeVar
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from expertmesh.comm import process
from expertmesh.comm.base import Comm, CommError
from expertmesh.comm.local import LocalWorld
from expertmesh.comm.meeting import Listener
from expertmesh.comm.process import ProcessComm
from expertmesh.mesh.topology import Topology

T = TypeVar("T")


class SocketWorld:
    """`LocalWorld`'s interface over `ProcessComm`. small: bytes from which parts inside a node are read in place;
    without a patience of its own, ranks wait for each other as long as they may take to connect."""

    def __init__(
        self,
        topology: Topology,
        timeout: float,
        patience: float | None = None,
        small: int = process.SMALL,
    ) -> None:
        self.topology, self.timeout, self.small = topology, timeout, small
        self.patience = timeout if patience is None else patience

    def run(self, program: Callable[[Comm], T]) -> list[T]:
        """A rank that fails closes its connections, as the end of its process would."""
        ranks = range(self.topology.ranks)
        results: list[T | BaseException] = [CommError("not run")] * self.topology.ranks
        listeners = [Listener("127.0.0.1") for _ in ranks]
        token, comms = secrets.token_bytes(16), dict[int, ProcessComm]()

        def serve(rank: int) -> None:
            torch.set_num_threads(1)
            places = {each: listener.place for each, listener in enumerate(listeners) if each != rank}
            try:
                comms[rank] = ProcessComm(
                    self.topology, rank, listeners[rank], places, token, self.timeout, self.patience
                )
                results[rank] = program(comms[rank])
            except BaseException as error:
                results[rank] = error
                if rank in comms:
                    comms.pop(rank).close()

        default = torch.get_num_threads()
        threads = [threading.Thread(target=serve, args=(r,), name=f"rank {r}", daemon=True) for r in ranks]
        with patch.object(process, "SMALL", self.small):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        torch.set_num_threads(default)
        for comm in comms.values():
            comm.close()
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed:
            raise min(failed, key=lambda error: isinstance(error, CommError))
        return [r for r in results if not isinstance(r, BaseException)]


def _threads(topology: Topology) -> LocalWorld:
    return LocalWorld(topology, 60)


def _sockets(topology: Topology) -> SocketWorld:
    return SocketWorld(topology, 60)


def _sockets_and_memory(topology: Topology) -> SocketWorld:
    return SocketWorld(topology, 60, small=1)


# To connect takes longer than most programs, so sockets are the rarer choice.
Worlds = Callable[[Topology], LocalWorld | SocketWorld]
WORLDS = st.sampled_from([*[_threads] * 6, _sockets, _sockets_and_memory])
EVERY_WORLD: list[Worlds] = [_threads, _sockets, _sockets_and_memory]
