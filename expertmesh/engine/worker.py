"""A rank that is a process: what `engine.processes` starts, and what it is told over its channel."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.comm.alone import Alone
from expertmesh.comm.base import Collectives, Comm
from expertmesh.comm.cards.collectives import card_collectives
from expertmesh.comm.cards.native import StepShape
from expertmesh.comm.fibers import Turns
from expertmesh.comm.process import ProcessComm
from expertmesh.comm.seat import Seat
from expertmesh.comm.streams import Streams
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.device import Device, find
from expertmesh.engine.checkpoint import load, open_checkpoint
from expertmesh.engine.memory import new_weights
from expertmesh.engine.plan import Plan
from expertmesh.engine.ranks import PATIENCE, collectives_of
from expertmesh.engine.runner import Runner
from expertmesh.engine.wire import BatchReader, Plain, read_masks, write_result
from expertmesh.errors import InputError
from expertmesh.kernels import kernels_for
from expertmesh.launch.channel import Channel
from expertmesh.launch.duty import Duty
from expertmesh.launch.inquiry import tell_on_signal
from expertmesh.launch.interfaces import interface_of
from expertmesh.launch.store import hosted, joined
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
                return place | {"interface": interface_of(place["address"])} | self.offers()
            case "meet":
                # One may take longer than another to begin, and the first exchange waits for it.
                self._comm = self._seat.meet(message, self._timeout, PATIENCE * self._timeout)
                self.begin(message)
            case _:
                return self.do(message)
        return None

    def offers(self) -> Plain:
        """What this rank says of itself when it says where it is."""
        return {}

    def begin(self, message: Plain) -> None:  # noqa: B027
        """What there is to do when all have met, if anything. message: what they were told then."""

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
        self._folder, self._kind, self._card = Path(spec["folder"]), spec["device"], spec["card"]
        self._address, self._own = spec["address"], spec["own"]
        topology = self._layout.topology
        peers = self._layout.how.peers(topology, self._number)
        super().__init__(topology, self._number, spec["address"], peers, spec["timeout"])
        self._reader = BatchReader()
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
                return {layer: rows.numpy().tobytes() for layer, rows in self._runner.loads.on_host().items()}
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

    def offers(self) -> Plain:
        """The memory of its card; of the first rank also where the collectives of cards meet."""
        self._device = find(self._kind, self._card)
        self._device.take()
        if not self._device.is_card:
            return {}
        said: Plain = {"room": asdict(self._device.room())}
        if self._number == 0:
            self._store = hosted(self._address)
            said["store"] = self._store.port
        return said

    def begin(self, message: Plain) -> None:
        config, device = EngineConfig(**message["config"]), self._device
        checkpoint = open_checkpoint(self._folder, ModelConfig.from_folder(self._folder))
        shard = Shard.of(self._number, self._layout.topology, self._layout.placement)
        kernels = kernels_for(device.kind, config.dtype, config.strict)
        if (not kernels.lacking) != self._own:
            # Weights that move would arrive in an order that the other kind cannot read.
            here = kernels.lacking or "they are there, and not where the engine runs"
            raise InputError(
                f"all machines need kernels of our own for {device.kind}, or none: on {socket.gethostname()} {here}"
            )
        new = new_weights(config, config.dtype, device.where, kernels)
        collectives = self._collectives(
            message, checkpoint.config, config
        )  # limits are found out before weights come
        model = DeepSeek(checkpoint.config, shard, kernels, new)
        load(checkpoint, model.weights(), shard, self.tell_progress)
        self._runner = Runner(model, config, collectives, device)

    def _collectives(self, message: Plain, model: ModelConfig, config: EngineConfig) -> Collectives:
        device, comm = self._device, self.comm
        if not device.is_card:
            return collectives_of(self._layout, comm)
        if self._layout.topology.ranks == 1:
            return Alone()
        host, port = message["store"]
        store = self._store if self._number == 0 else joined(host, port, self._timeout)
        shape = StepShape.of(model, config, self._layout.topology)
        return cards_collectives(self._layout, comm, device, store, PATIENCE * self._timeout, shape)


def cards_collectives(
    layout: Layout, comm: Comm, device: Device, store: Any, timeout: float, shape: StepShape
) -> Collectives:
    """What the runner of one rank of several needs whose rows lie on a card. store: of torch.distributed, by which the
    ranks meet. What they send is counted where the transport counts what it sends itself."""
    return card_collectives(
        layout, comm.rank, device.where, device.backend, store=store, timeout=timeout, shape=shape,
        turns=Turns(Streams(device.library)), sent=comm.sent,
    )  # fmt: skip


def _moves(message: Plain) -> list[Move]:
    return [Move(*move) for move in message["moves"]]
