"""The ranks of a cluster as the engine sees them: one call computes a step on all of them. Here as threads."""

import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from expertmesh.comm.alone import Alone
from expertmesh.comm.base import ByteCount, Collectives, Comm, CommError
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.group import Clustered
from expertmesh.comm.local import LocalWorld
from expertmesh.config import EngineConfig
from expertmesh.device import Device
from expertmesh.engine.checkpoint import Checkpoint, Progress, load_ranks
from expertmesh.engine.memory import Memory, check_sharing, new_weights, resolve_memory, shards_of
from expertmesh.engine.plan import Plan
from expertmesh.engine.runner import Runner
from expertmesh.errors import RankFailure
from expertmesh.kernels import Kernels
from expertmesh.launch.crew import name_of, place_of
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.migration import Move
from expertmesh.mesh.placement import Placement
from expertmesh.model.deepseek import DeepSeek
from expertmesh.request import Batch, StepResult


class Ranks(Protocol):
    """All ranks. config is resolved; memory is that of each."""

    config: EngineConfig
    memory: Memory
    resets: int  # how often `reset` has been called

    @property
    def pids(self) -> list[int]:
        """Processes of the ranks, none where they are threads of this one."""
        ...

    def run(self, batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        """One step of every TP group, an idle one with an empty batch. RankFailure where a rank fails."""
        ...

    def loads(self) -> dict[int, Tensor]:
        """Rows per expert of each layer with routed experts, over all ranks, since the last `reset`."""
        ...

    def sent(self) -> list[ByteCount]:
        """What each rank sent since the last `reset`."""
        ...

    def parts(self) -> list[tuple[int, dict[str, float]]]:
        """Of each rank of several: steps that were measured, and seconds by part (`engine.parts`), since the last
        `reset`."""
        ...

    def reset(self) -> None:
        """Count loads, bytes and seconds from 0."""
        ...

    def stage(self, moves: Sequence[Move], start: int, stop: int) -> None:
        """Bytes [start, stop) of the weights of the moving experts come to their ranks' spare memory."""
        ...

    def checksums(self, moves: Sequence[Move]) -> list[tuple[int, int]]:
        """For each move that of the weights at their source, and of what has come."""
        ...

    def commit(self, moves: Sequence[Move], placement: Placement) -> None:
        """What has come serves from the next step on, and `placement` holds."""
        ...

    def awaited(self) -> list[int]:
        """Ranks that have not answered in the step that is under way. Any thread may ask."""
        ...

    def place(self, rank: int) -> dict[str, Any]:
        """Rank, node, card and host of a rank, as plain data."""
        ...

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Call this with the message, in another thread, where a rank fails while nothing is asked of it."""
        ...

    def close(self) -> None:
        """End all ranks; nothing can be computed any more."""
        ...


# A rank that computes for long is late at a collective without having failed; one that dies, or does not answer, is
# seen otherwise. So only a deadlock meets this bound, in time-outs.
PATIENCE = 40
GRACE = 5.0  # seconds in which the cause of a failure shows, when others have seen its effect


def collectives_of(layout: Layout, comm: Comm) -> Collectives:
    """What the runner of one rank of several needs, whose rows lie in the memory of a processor."""
    return Clustered(comm, TieredExchange(comm, layout.placement, layout.how))


class ThreadRanks:
    """Ranks as threads that share weights; one rank runs in the caller's own thread. Implements `Ranks`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        layout: Layout,
        kernels: Kernels,
        device: Device,
        progress: bool | Progress,
    ) -> None:
        self.layout, topology = layout, layout.topology
        check_sharing(topology.ranks)
        self.config, self.memory = resolve_memory(
            checkpoint, config, layout, kernels, device.room(), topology.ranks, together=True
        )
        self._world = LocalWorld(topology, PATIENCE * config.timeout)
        new = new_weights(self.config, self.config.dtype, device.where, kernels, {})
        self.runners: list[Runner] = []
        self._comms: list[Comm] = []
        shards = shards_of(layout, config)
        for rank, shard in enumerate(shards):
            model = DeepSeek(checkpoint.config, shard, kernels, new)
            collectives: Collectives = Alone()
            if topology.ranks > 1:
                comm = self._world.comm(rank)
                self._comms.append(comm)
                collectives = collectives_of(layout, comm)
            self.runners.append(Runner(model, self.config, collectives, device))
        load_ranks(
            checkpoint, [(r.model.weights(), s) for r, s in zip(self.runners, shards, strict=True)], progress
        )
        self._steps = self.resets = 0
        self._done_by: Collection[int] = ()
        self._failure: str | None = None
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._inboxes: list[queue.SimpleQueue[_Work | None]] = []
        self._threads: list[threading.Thread] = []
        if topology.ranks > 1:
            self._start_threads()

    def _start_threads(self) -> None:
        threads = torch.get_num_threads()
        for rank, runner in enumerate(self.runners):
            inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
            self._inboxes.append(inbox)
            arguments = (rank, runner, self._world, inbox, self._done)
            thread = threading.Thread(target=_serve, args=arguments, name=f"rank {rank}", daemon=True)
            thread.start()
            self._threads.append(thread)
        # The threads do not hold this object: they end with it, and before the interpreter does.
        weakref.finalize(self, _end, self._inboxes, self._threads)
        for _ in self.runners:
            self._done.get()
        torch.set_num_threads(threads)  # of other threads of this process: the ranks have changed the default

    def run(self, batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        self._check_alive()
        self._steps += 1
        if not self._inboxes:
            return [self.runners[0].run(batches[0], plan)]
        topology = self.layout.topology

        def step(batch: Batch) -> _Work:
            return lambda runner: runner.run(batch, plan)

        done = self._all([step(batches[topology.group_of(rank)]) for rank in range(topology.ranks)])
        firsts = (done[rank] for rank in range(0, topology.ranks, topology.tp))
        return [result for result in firsts if isinstance(result, StepResult)]

    def _all(self, works: "Sequence[_Work]") -> "dict[int, Any]":
        """What each rank returns. RankFailure where one fails."""
        self._check_alive()
        topology = self.layout.topology
        try:
            for inbox, work in zip(self._inboxes, works, strict=True):
                inbox.put(work)
            done = self._collect()
        except KeyboardInterrupt:
            if len(self._done_by) < topology.ranks:
                self._failure = f"the engine was interrupted in the middle of step {self._steps}"
            raise
        self._check(done)
        return done

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RankFailure(self._failure)

    def _collect(self) -> "dict[int, Any]":
        """What every rank brought, or what came of it where one has failed: who hangs brings nothing."""
        done: dict[int, Any] = {}
        self._done_by = done.keys()
        failed = False
        while len(done) < self.layout.topology.ranks:
            try:
                rank, result = self._done.get(timeout=GRACE if failed else 1.0)
            except queue.Empty:
                if failed:
                    break
                continue  # a signal that another thread was given is seen here
            done[rank] = result
            failed = failed or isinstance(result, BaseException)
        return done

    def _check(self, done: "dict[int, Any]") -> None:
        """RankFailure where a rank has failed. What others saw of it is not the cause."""
        failed = {rank: e for rank, e in done.items() if isinstance(e, BaseException)}
        if not failed:
            return
        missing = [rank for rank in range(self.layout.topology.ranks) if rank not in done]
        causes = [rank for rank, e in failed.items() if not isinstance(e, CommError)]
        rank = min(causes or missing or failed)
        error = failed.get(rank)
        cause = f"failed in step {self._steps}: {type(error).__name__}: {error}"
        if error is None:
            cause = f"has been computing step {self._steps} for so long that the others gave up"
        self._failure = f"{name_of(rank, self.layout.topology)} on {socket.gethostname()} {cause}"
        raise RankFailure(self._failure) from error

    @property
    def pids(self) -> list[int]:
        return []

    def stage(self, moves: Sequence[Move], start: int, stop: int) -> None:
        self._all([lambda runner: runner.mover.stage(moves, start, stop)] * self.layout.topology.ranks)

    def checksums(self, moves: Sequence[Move]) -> list[tuple[int, int]]:
        return matched(moves, [runner.mover.checksums(moves) for runner in self.runners])

    def commit(self, moves: Sequence[Move], placement: Placement) -> None:
        # As a step is: where one rank has it and another one has not, nothing right can be computed any more.
        self._all([lambda runner: runner.mover.commit(moves, placement)] * self.layout.topology.ranks)

    def loads(self) -> dict[int, Tensor]:
        return sum_loads([r.loads.on_host() for r in self.runners])

    def sent(self) -> list[ByteCount]:
        return [comm.sent for comm in self._comms]

    def parts(self) -> list[tuple[int, dict[str, float]]]:
        return [(r.parts.steps, dict(r.parts.seconds)) for r in self.runners[: len(self._comms)]]

    def reset(self) -> None:
        self.resets += 1
        for runner in self.runners:
            runner.loads.reset()
            runner.parts.reset()
        for comm in self._comms:
            comm.sent.clear()

    def awaited(self) -> list[int]:
        return [rank for rank in range(len(self.runners)) if not self._inboxes or rank not in self._done_by]

    def place(self, rank: int) -> dict[str, Any]:
        return place_of(rank, self.layout.topology, socket.gethostname())

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Threads fail in steps alone."""

    def close(self) -> None:
        self._failure = self._failure or "the engine is closed"
        _end(self._inboxes, self._threads)


_Work: TypeAlias = Callable[[Runner], Any]
_Done: TypeAlias = tuple[int, Any]


def _serve(
    rank: int,
    runner: Runner,
    world: LocalWorld,
    inbox: "queue.SimpleQueue[_Work | None]",
    done: "queue.SimpleQueue[_Done]",
) -> None:
    """One rank's thread. The cores are shared by the ranks, not by the threads of an op."""
    torch.set_num_threads(1)
    done.put((rank, StepResult()))  # started
    while (work := inbox.get()) is not None:
        try:
            with world.turn:
                result = work(runner)
            done.put((rank, result))
        except BaseException as error:
            if not isinstance(error, CommError):
                world.fail(f"rank {rank} failed: {error}")
            done.put((rank, error))


def _end(inboxes: "Sequence[queue.SimpleQueue[_Work | None]]", threads: Sequence[threading.Thread]) -> None:
    """Tell all threads to end, and see that they have: one that still ran while the interpreter ends would abort the
    process."""
    for inbox in inboxes:
        inbox.put(None)
    end = time.monotonic() + GRACE
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))


def matched(moves: Sequence[Move], by_rank: Sequence[Sequence[int | None]]) -> list[tuple[int, int]]:
    """What `Mover.checksums` says on every rank, by moves: of what was given, and of what has come."""
    return [(by_rank[m.source][i] or 0, by_rank[m.rank][i] or 0) for i, m in enumerate(moves)]


def sum_loads(counts: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    """Loads of several ranks together, by layer."""
    total: dict[int, Tensor] = {}
    for one in counts:
        for layer, rows in one.items():
            total[layer] = total[layer] + rows if layer in total else rows.clone()
    return dict(sorted(total.items()))
