"""A rank that is a process: what `engine.processes` starts, and what it is told over its channel."""

from pathlib import Path
from typing import Any

import torch

from expertmesh.comm.process import ProcessComm
from expertmesh.comm.seat import Seat
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.checkpoint import load, open_checkpoint
from expertmesh.engine.plan import Plan
from expertmesh.engine.ranks import PATIENCE, TORCH_DTYPES, collectives_of
from expertmesh.engine.runner import Runner
from expertmesh.engine.wire import BatchReader, Plain, write_result
from expertmesh.kernels import kernels_for
from expertmesh.launch.channel import Channel
from expertmesh.launch.duty import Duty
from expertmesh.launch.inquiry import tell_on_signal
from expertmesh.launch.interfaces import interface_of
from expertmesh.mesh.layout import Layout
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.layers import New
from expertmesh.weights import Shard


def serve_rank(spec: Plain, channel: Channel) -> None:
    """Compute steps until the driver ends this process. A failure is told to it, and it ends all ranks."""
    torch.set_num_threads(spec["threads"])
    duty = Duty(spec, channel)
    rank = _Rank(spec)
    duty.where, duty.waits = rank.where, rank.waits
    tell_on_signal(duty.describe, at_once=True)
    duty.serve(rank.obey)


class _Rank:
    def __init__(self, spec: Plain) -> None:
        self._layout, self._number = Layout.from_plain(spec["layout"]), spec["rank"]
        self._folder, self._config = Path(spec["folder"]), EngineConfig(**spec["config"])
        topology = self._layout.topology
        peers = self._layout.how.peers(topology, self._number)
        self._seat = Seat(topology, self._number, spec["address"], peers)
        self._comm: ProcessComm | None = None
        self._reader = BatchReader()

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
                # Loading may take one longer than another, and the first exchange waits for it.
                timeout = self._config.timeout
                self._comm = self._seat.meet(message, timeout, PATIENCE * timeout)
                self._load(self._comm)
            case "step":
                batch, plan = self._reader.read(message["batch"]), Plan(**message["plan"])
                return write_result(self._runner.run(batch, plan))
            case "loads":
                return {layer: rows.tolist() for layer, rows in self._runner.loads.counts.items()}
            case "sent":
                assert self._comm is not None
                tables = self._comm.sent.bytes, self._comm.sent.messages
                return [{purpose: row.tolist() for purpose, row in table.items()} for table in tables]
            case "reset":
                assert self._comm is not None
                self._runner.loads.counts.clear()
                self._comm.sent.clear()
            case other:
                raise ValueError(f"no such message: {other}")
        return None

    def _load(self, comm: ProcessComm) -> None:
        checkpoint = open_checkpoint(self._folder, ModelConfig.from_folder(self._folder))
        shard = Shard.of(self._number, self._layout.topology, self._layout.placement)
        new = New(TORCH_DTYPES[self._config.dtype], torch.device("cpu"))
        model = DeepSeek(checkpoint.config, shard, kernels_for("cpu", self._config.strict), new)
        load(checkpoint, model.weights(), shard)
        self._runner = Runner(model, self._config, collectives_of(self._layout, comm))
