"""A rank that is a process: what `engine.processes` starts, and what it is told over its channel."""

import os
import queue
import threading
from pathlib import Path
from typing import Any

import torch

from expertmesh.comm.base import CommError
from expertmesh.comm.process import ProcessComm
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.checkpoint import load, open_checkpoint
from expertmesh.engine.ranks import PATIENCE, TORCH_DTYPES, collectives_of
from expertmesh.engine.runner import Runner
from expertmesh.engine.wire import BatchReader, Plain, write_result
from expertmesh.kernels import kernels_for
from expertmesh.launch.channel import Channel, ChannelClosed
from expertmesh.mesh.layout import Layout
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.layers import New
from expertmesh.weights import Shard

ENDED = 3  # exit status of a rank that the driver has ended


def serve_rank(spec: Plain, channel: Channel) -> None:
    """Compute steps until the driver ends this process. A failure is told to it, and it ends all ranks."""
    torch.set_num_threads(spec["threads"])
    inbox: queue.SimpleQueue[Plain] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    try:
        rank = _Rank(spec)
        channel.send({"ready": True})
        while True:
            channel.send({"done": rank.obey(inbox.get())})
    except BaseException as error:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, CommError) else str(error)
        channel.send({"failed": text, "cause": not isinstance(error, CommError)})
        inbox.get()  # until the driver ends this process


def _listen(channel: Channel, inbox: "queue.SimpleQueue[Plain]") -> None:
    """A thread of its own, so that a rank that waits for others in a collective still hears the driver."""
    while True:
        try:
            message = channel.receive()
            if message["do"] == "ping":
                channel.send({"pong": True})
                continue
        except ChannelClosed:  # the driver has ended
            os._exit(ENDED)
        if message["do"] == "end":
            os._exit(ENDED)
        inbox.put(message)


class _Rank:
    def __init__(self, spec: Plain) -> None:
        layout, number = Layout.from_plain(spec["layout"]), spec["rank"]
        folder, config = Path(spec["folder"]), EngineConfig(**spec["config"])
        # The driver finds out who does not answer; a collective itself has patience with those that compute.
        self._comm = ProcessComm(layout.topology, number, spec["port"], PATIENCE * config.timeout)
        checkpoint = open_checkpoint(folder, ModelConfig.from_folder(folder))
        shard = Shard.of(number, layout.topology, layout.placement)
        new = New(TORCH_DTYPES[config.dtype], torch.device("cpu"))
        model = DeepSeek(checkpoint.config, shard, kernels_for("cpu", config.strict), new)
        load(checkpoint, model.weights(), shard)
        self._runner = Runner(model, config, collectives_of(layout, self._comm))
        self._reader = BatchReader()

    def obey(self, message: Plain) -> Any:
        """Do what the message says; returns the answer."""
        match message["do"]:
            case "step":
                return write_result(self._runner.run(self._reader.read(message["batch"])))
            case "loads":
                return {layer: rows.tolist() for layer, rows in self._runner.loads.counts.items()}
            case "sent":
                sent = self._comm.sent
                return [
                    {purpose: row.tolist() for purpose, row in table.items()}
                    for table in (sent.bytes, sent.messages)
                ]
            case "reset":
                self._runner.loads.counts.clear()
                self._comm.sent.clear()
                return None
            case other:
                raise ValueError(f"no such message: {other}")
