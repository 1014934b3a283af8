"""What the processes in these tests run."""

import os
import time
from typing import Any

import torch

from expertmesh.bench.gloo import GlooComm
from expertmesh.comm.seat import Seat
from expertmesh.launch.channel import Channel
from expertmesh.launch.duty import Duty
from expertmesh.mesh.topology import Topology

LIMIT = 60.0


def serve_rank(spec: dict[str, Any], channel: Channel) -> None:
    """A rank of one node that talks over gloo: {"do": "exchange"}; {"do": "leave"} ends it, a while after its
    connections."""
    duty, topology = Duty(spec, channel), Topology(1, spec["ranks"], 1)
    seat = Seat(topology, spec["rank"], spec["address"], topology.all_ranks())
    comms: list[GlooComm] = []

    def obey(message: dict[str, Any]) -> Any:
        match message["do"]:
            case "place":
                return seat.place()
            case "meet":
                comms.append(GlooComm(seat.meet(message, LIMIT, LIMIT), spec["address"], LIMIT))
            case "exchange":
                ranks = topology.all_ranks()
                parts = [torch.full((3,), r, dtype=torch.uint8) for r in ranks]
                return [part.tolist() for part in comms[0].exchange("dispatch", ranks, parts)]
            case "leave":
                comms.pop().close()
                time.sleep(0.5)
                os._exit(5)
        return None

    duty.serve(obey)
