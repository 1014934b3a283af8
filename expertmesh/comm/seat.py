"""How a process takes its seat in a cluster: it says where it listens, and hears where the others do."""

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from expertmesh.comm.meeting import Listener, Place
from expertmesh.comm.process import ProcessComm
from expertmesh.mesh.topology import Topology


class Seat:
    """One rank's, in the two steps in which all ranks take theirs together."""

    def __init__(self, topology: Topology, rank: int, address: str, peers: Collection[int]) -> None:
        """address: where other nodes reach this rank; peers: the ranks that it talks with."""
        self._topology, self._rank, self._peers = topology, rank, peers
        self._listener = Listener(address)

    def place(self) -> dict[str, Any]:
        """Where this rank listens."""
        return asdict(self._listener.place)

    def meet(self, message: dict[str, Any], timeout: float, patience: float) -> ProcessComm:
        """Connect; message has the places of all ranks, in their order, and the token. CommError: see `ProcessComm`."""
        places = {
            rank: Place(**place)
            for rank, place in enumerate(message["places"])
            if rank != self._rank and rank in self._peers
        }
        return ProcessComm(
            self._topology, self._rank, self._listener, places, message["token"], timeout, patience
        )
