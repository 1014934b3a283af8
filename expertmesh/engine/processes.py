"""Ranks as processes of this machine: the driver's side."""

import contextlib
import selectors
import signal
import time
import weakref
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed import TCPStore

from expertmesh.comm.base import ByteCount
from expertmesh.comm.local import cores
from expertmesh.comm.process import ENVIRONMENT, host_store
from expertmesh.config import EngineConfig
from expertmesh.engine.checkpoint import Checkpoint
from expertmesh.engine.ranks import describe_rank, resolve_memory, sum_loads
from expertmesh.engine.wire import BatchWriter, Plain, read_result
from expertmesh.errors import RankFailure
from expertmesh.kernels import Kernels
from expertmesh.launch.channel import ChannelClosed
from expertmesh.launch.forkserver import ForkServer, Process
from expertmesh.mesh.layout import Layout
from expertmesh.request import Batch, StepResult

GRACE = 2.0  # seconds that a rank has to end when it is told to, and that the cause of a failure has to show
PRELOAD = ("torch", "numpy", "expertmesh.engine.worker")


class ProcessRanks:
    """Ranks as processes that share nothing, with collectives over loopback. Implements `engine.ranks.Ranks`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        layout: Layout,
        kernels: Kernels,
        server: ForkServer | None = None,
    ) -> None:
        """server: whose children the ranks become, one of its own where none is given."""
        self.layout = layout
        self.config, self.memory = resolve_memory(checkpoint, config, layout, kernels, together=False)
        self._steps = 0
        self._failure: str | None = None
        self._writers = [BatchWriter() for _ in range(layout.topology.groups)]
        self._processes: list[Process] = []
        own = None if server else ForkServer(PRELOAD)
        # Also where nobody closes: when this object goes, or the interpreter.
        self._end = weakref.finalize(self, _end, self._processes, own)
        ranks = layout.topology.ranks
        store = host_store()
        self._store: TCPStore | None = store
        common = {
            "folder": str(checkpoint.folder.resolve()),
            "config": asdict(self.config),
            "layout": layout.to_plain(),
            "port": store.port,
            "threads": max(1, cores() // ranks),
        }
        specs = [common | {"rank": rank} for rank in range(ranks)]
        try:
            program = "expertmesh.engine.worker:serve_rank"
            self._processes += (server or own).start(program, specs, ENVIRONMENT)  # type: ignore[union-attr]
            for process in self._processes:
                process.channel.bound_sending(self.config.timeout)
            self._gather("ready")
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process of each rank."""
        return [process.pid for process in self._processes]

    def run(self, batches: Sequence[Batch]) -> list[StepResult]:
        self._steps += 1
        topology = self.layout.topology
        written = [writer.write(batch) for writer, batch in zip(self._writers, batches, strict=True)]
        answers = self._ask(
            [{"do": "step", "batch": written[topology.group_of(r)]} for r in range(topology.ranks)]
        )
        return [read_result(answer) for answer in answers[:: topology.tp]]

    def loads(self) -> dict[int, Tensor]:
        counts = self._ask([{"do": "loads"}] * self.layout.topology.ranks)
        return sum_loads([{layer: torch.tensor(rows) for layer, rows in one.items()} for one in counts])

    def sent(self) -> list[ByteCount]:
        answers = self._ask([{"do": "sent"}] * self.layout.topology.ranks)
        return [
            ByteCount(
                self.layout.topology, rank, *({k: np.array(v) for k, v in table.items()} for table in answer)
            )
            for rank, answer in enumerate(answers)
        ]

    def reset(self) -> None:
        self._ask([{"do": "reset"}] * self.layout.topology.ranks)

    def close(self) -> None:
        self._failure = self._failure or "the engine is closed"
        self._end()
        self._store = None

    def _ask(self, messages: Sequence[Plain]) -> list[Any]:
        """One message to every rank, and every rank's answer. Whatever breaks in between ends the engine: ranks that
        are not in the same step would answer something else the next time."""
        if self._failure is not None:
            raise RankFailure(self._failure)
        try:
            for rank, (process, message) in enumerate(zip(self._processes, messages, strict=True)):
                try:
                    process.channel.send(message)
                except ChannelClosed:
                    if process.wait(1.0) is None:  # it lives, and does not read
                        self._fail(rank, f"does not answer any more in {self._when}")
            return self._gather("done")
        except BaseException as error:
            self._failure = self._failure or f"the engine was broken off in {self._when}: {error!r}"
            raise

    def _gather(self, key: str) -> list[Any]:
        """The answer of every rank under this key. RankFailure, and an end of all ranks, where one has failed."""
        answers: dict[int, Any] = {}
        heard = dict.fromkeys(range(len(self._processes)), time.monotonic())
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(process.channel, selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                ready = selector.select(self.config.timeout / 4)
                for event, _ in ready:
                    heard[event.data] = time.monotonic()
                    self._hear(event.data, key, answers)
                if not ready:
                    self._ping(heard.keys() - answers.keys(), heard)
        return [answers[rank] for rank in range(len(self._processes))]

    def _hear(self, rank: int, key: str, answers: dict[int, Any]) -> None:
        """Read what one rank says."""
        try:
            message = self._processes[rank].channel.receive()
        except ChannelClosed:
            self._fail(rank, self._death(rank))
        if key in message:
            answers[rank] = message[key]
        elif "failed" in message:
            if not message["cause"]:
                self._find_cause(rank, message["failed"], answers)
            self._fail(rank, f"failed in {self._when}: {message['failed']}")

    def _ping(self, waiting: Collection[int], heard: dict[int, float]) -> None:
        """A rank may compute as long as it likes, but it has a thread that answers. Who does not has failed."""
        now = time.monotonic()
        for rank in waiting:
            if now - heard[rank] > self.config.timeout:
                self._fail(
                    rank, f"does not answer any more in {self._when}, for {self.config.timeout:g} s now"
                )
            with contextlib.suppress(ChannelClosed):  # seen when its channel is read
                self._processes[rank].channel.send({"do": "ping"})

    def _find_cause(self, witness: int, problem: str, answered: Collection[int]) -> NoReturn:
        """A collective of this rank has failed, because of another one as a rule: wait a moment to hear of that."""
        quiet = set(range(len(self._processes))) - {witness} - set(answered)
        end = time.monotonic() + GRACE
        with selectors.DefaultSelector() as selector:
            for rank in quiet:
                selector.register(self._processes[rank].channel, selectors.EVENT_READ, rank)
            while (left := end - time.monotonic()) > 0:
                for event, _ in selector.select(left):
                    try:
                        message = self._processes[event.data].channel.receive()
                    except ChannelClosed:
                        self._fail(event.data, self._death(event.data))
                    if message.get("cause"):
                        self._fail(event.data, f"failed in {self._when}: {message['failed']}")
                    if "failed" in message:
                        quiet.discard(event.data)
        if quiet:
            self._fail(min(quiet), f"has been computing {self._when} for so long that the others gave up")
        self._fail(witness, f"could not go on in {self._when}: {problem}")

    @property
    def _when(self) -> str:
        return f"step {self._steps}" if self._steps else "the start"

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        status = process.wait(GRACE)
        if status is not None and status < 0:
            how = f"killed by signal {-status} ({signal.Signals(-status).name})"
        else:
            how = "it closed its channel" if status is None else f"it exited with status {status}"
        return f"died in {self._when}: {how}, process {process.pid}"

    def _fail(self, rank: int, cause: str) -> NoReturn:
        self._failure = f"{describe_rank(self.layout, rank)} {cause}; all ranks have been stopped"
        self.close()
        raise RankFailure(self._failure)


def _end(processes: Sequence[Process], server: ForkServer | None) -> None:
    """End all ranks, by force where they do not listen, and then the server."""
    for process in processes:
        with contextlib.suppress(ChannelClosed):
            process.channel.bound_sending(GRACE)
            process.channel.send({"do": "end"})
    end = time.monotonic() + GRACE
    for process in processes:
        if process.wait(max(0.0, end - time.monotonic())) is None:
            process.kill(signal.SIGKILL)
    for process in processes:
        process.wait(GRACE)
        process.channel.close()
    if server is not None:
        server.close()
