"""A rank that is a process: what `engine.processes` starts, and what it is told over its channel."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.comm.process import ProcessComm
from expertmesh.comm.seat import Seat
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.checkpoint import load, open_checkpoint
from expertmesh.engine.plan import Plan
from expertmesh.engine.ranks import PATIENCE, collectives_of, new_weights
from expertmesh.engine.runner import Runner
from expertmesh.engine.wire import BatchReader, Plain, read_masks, write_result
from expertmesh.errors import InputError
from expertmesh.kernels import kernels_for
from expertmesh.launch.channel import Channel
from expertmesh.launch.duty import Duty
from expertmesh.launch.inquiry import tell_on_signal
from expertmesh.launch.interfaces import interface_of
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.migration import Move
from expertmesh.mesh.topology import Topology
from expertmesh.model.deepseek import DeepSeek
from expertmesh.weights import Shard


class RankProcess(ABC):
    """What every program of ranks does: it takes its seat among the others, and says where it stands."""

    def __init__(
        self, topology: Topology, rank: int, address: str, peers: Collection[int], timeout: float
    ) -> None:
        """address, peers: see `Seat`; timeout: seconds in which those have to be connected."""
        self._seat, self._timeout = Seat(topology, rank, address, peers), timeout
        self._comm: ProcessComm | None = None
        self.tell_progress: Callable[[int, int], None] = lambda done, total: None

    @property
    def comm(self) -> ProcessComm:
        assert self._comm is not None  # before all have met, nothing is asked that needs it
        return self._comm

    def where(self) -> str | None:
        return self._comm.where() if self._comm else None

    def waits(self) -> list[Any] | None:
        return self._comm.waits() if self._comm else None

    def obey(self, message: Plain) -> Any:
        """Do what the message says; returns the answer."""
        match message["do"]:
            case "place":
                place = self._seat.place()
                return place | {"interface": interface_of(place["address"])}
            case "meet":
                # One may take longer than another to begin, and the first exchange waits for it.
                self._comm = self._seat.meet(message, self._timeout, PATIENCE * self._timeout)
                self.begin()
            case _:
                return self.do(message)
        return None

    def begin(self) -> None:  # noqa: B027
        """What there is to do when all have met, if anything."""

    @abstractmethod
    def do(self, message: Plain) -> Any:
        """Any other message."""


def serve(spec: Plain, channel: Channel, threads: int, program: Callable[[Plain], RankProcess]) -> None:
    """Be a rank until the driver ends this process. A failure is told to it, and it ends all ranks."""
    torch.set_num_threads(threads)
    duty = Duty(spec, channel)
    tell_on_signal(duty.describe, at_once=True)
    rank = program(spec)
    duty.where, duty.waits, rank.tell_progress = rank.where, rank.waits, duty.tell_progress
    duty.serve(rank.obey)


def serve_rank(spec: Plain, channel: Channel) -> None:
    """Compute steps."""
    serve(spec, channel, spec["threads"], _Rank)


class _Rank(RankProcess):
    def __init__(self, spec: Plain) -> None:
        self._layout, self._number = Layout.from_plain(spec["layout"]), spec["rank"]
        self._folder, self._config = Path(spec["folder"]), EngineConfig(**spec["config"])
        topology = self._layout.topology
        peers = self._layout.how.peers(topology, self._number)
        super().__init__(topology, self._number, spec["address"], peers, self._config.timeout)
        self._reader, self._native = BatchReader(), spec["native"]
        self._placement = self._layout.placement

    def do(self, message: Plain) -> Any:
        match message["do"]:
            case "step":
                batch = replace(
                    self._reader.read(message["batch"]), masks=read_masks(message.get("masks", {}))
                )
                return write_result(self._runner.run(batch, Plan(**message["plan"])))
            case "stage":
                self._runner.mover.stage(_moves(message), message["start"], message["stop"])
            case "checksums":
                return self._runner.mover.checksums(_moves(message))
            case "commit":
                slots = {layer: np.array(s, dtype=np.int64) for layer, s in message["slots"].items()}
                self._placement = self._placement.replaced(slots)
                self._runner.mover.commit(_moves(message), self._placement)
            case "loads":
                return {layer: rows.numpy().tobytes() for layer, rows in self._runner.loads.counts.items()}
            case "sent":
                tables = self.comm.sent.bytes, self.comm.sent.messages
                return [{purpose: row.tolist() for purpose, row in table.items()} for table in tables]
            case "parts":
                return [self._runner.parts.steps, self._runner.parts.seconds]
            case "reset":
                self._runner.loads.reset()
                self._runner.parts.reset()
                self.comm.sent.clear()
            case other:
                raise ValueError(f"no such message: {other}")
        return None

    def begin(self) -> None:
        checkpoint = open_checkpoint(self._folder, ModelConfig.from_folder(self._folder))
        shard = Shard.of(self._number, self._layout.topology, self._layout.placement)
        kernels = kernels_for("cpu", self._config.dtype, self._config.strict)
        if (kernels.graph is not None) != self._native:
            # Weights that move would arrive in an order that the other kind cannot read.
            here = kernels.lacking or "they are there, and not where the engine runs"
            raise InputError(
                f"all machines need the CPU's own kernels, or none: on {socket.gethostname()} {here}"
            )
        new = new_weights(self._config, self._config.dtype, "cpu", kernels)
        model = DeepSeek(checkpoint.config, shard, kernels, new)
        load(checkpoint, model.weights(), shard, self.tell_progress)
        self._runner = Runner(model, self._config, collectives_of(self._layout, self.comm))


def _moves(message: Plain) -> list[Move]:
    return [Move(*move) for move in message["moves"]]
