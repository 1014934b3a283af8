"""Ranks as processes, on this machine or on many: the driver's side."""

import secrets
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from expertmesh.comm.base import ByteCount
from expertmesh.comm.local import cores
from expertmesh.comm.meeting import Place
from expertmesh.config import EngineConfig
from expertmesh.device import Device, Room, find
from expertmesh.engine.checkpoint import Checkpoint, Progress
from expertmesh.engine.memory import check_sharing, resolve_memory
from expertmesh.engine.plan import Plan
from expertmesh.engine.ranks import matched, sum_loads
from expertmesh.engine.wire import BatchWriter, read_result, write_masks
from expertmesh.kernels import Kernels
from expertmesh.launch.crew import Crew
from expertmesh.launch.inquiry import tell_on_signal
from expertmesh.launch.launcher import Here, Launcher, Spec
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.migration import Move
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology
from expertmesh.request import Batch, StepResult

PRELOAD = ("torch", "numpy", "greenlet", "expertmesh.engine.worker")
PROGRAM = "expertmesh.engine.worker:serve_rank"
Agree: TypeAlias = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


class ProcessRanks:
    """Ranks as processes that share nothing. Implements `engine.ranks.Ranks`. places: host, interface, address and
    port of each."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        layout: Layout,
        kernels: Kernels,
        device: Device,
        launcher: Launcher | None = None,
        progress: Progress | None = None,
    ) -> None:
        """launcher: starts the ranks, on this machine where none is given. progress: is told what they have loaded."""
        self.layout = layout
        ranks = layout.topology.ranks
        sharing = (launcher.sharing if launcher else None) or ranks
        check_sharing(sharing)

        def settle(room: Room, sharing: int) -> None:
            self.config, self.memory = resolve_memory(
                checkpoint, config, layout, kernels, room, sharing, together=False
            )

        if device.is_card:
            find(
                device.kind, sharing - 1
            )  # refused before anything starts; other machines see for themselves
        else:
            settle(device.room(), sharing)

        def agree(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
            """What ranks on cards have: each says how much memory its own has, and none has less of the cache."""
            if device.is_card:
                settle(min((Room(**place["room"]) for place in places), key=lambda room: room.free), 1)
            store = [places[0]["address"], places[0].get("store")]
            return {"config": asdict(self.config), "store": store}

        self._steps = self.resets = 0
        self._writers = [BatchWriter() for _ in range(layout.topology.groups)]
        common = {
            "folder": str(checkpoint.folder.resolve()),
            "device": device.kind,
            "timeout": config.timeout,
            "layout": layout.to_plain(),
            "threads": max(1, cores() // sharing),
            "own": not kernels.lacking,
        }
        specs = [common | {"rank": rank, "card": rank % sharing} for rank in range(ranks)]
        self.crew, self.places = assemble(
            launcher or Here(PRELOAD), PROGRAM, specs, layout.topology, config.timeout, progress, agree
        )
        # Also where nobody closes: when this object goes, or the interpreter.
        self._end = weakref.finalize(self, Crew.close, self.crew)

    @property
    def pids(self) -> list[int]:
        """Process of each rank."""
        return [member.pid for member in self.crew.members]

    def run(self, batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        self._steps += 1
        topology = self.layout.topology
        written = [writer.write(batch) for writer, batch in zip(self._writers, batches, strict=True)]
        messages: list[dict[str, Any]] = [
            {"do": "step", "batch": written[topology.group_of(r)], "plan": asdict(plan)}
            for r in range(topology.ranks)
        ]
        # The first rank of each group samples.
        for message, batch in zip(messages[:: topology.tp], batches, strict=True):
            message["masks"] = write_masks(batch)
        answers = self.crew.ask(messages, f"step {self._steps}")
        return [read_result(answer) for answer in answers[:: topology.tp]]

    def loads(self) -> dict[int, Tensor]:
        counts = self.crew.ask([{"do": "loads"}] * self.layout.topology.ranks)
        # As bytes: of a large cluster they are millions of numbers.
        return sum_loads(
            [
                {layer: torch.from_numpy(np.frombuffer(rows, np.int64).copy()) for layer, rows in one.items()}
                for one in counts
            ]
        )

    def sent(self) -> list[ByteCount]:
        answers = self.crew.ask([{"do": "sent"}] * self.layout.topology.ranks)
        return [
            ByteCount(
                self.layout.topology, rank, *({k: np.array(v) for k, v in table.items()} for table in answer)
            )
            for rank, answer in enumerate(answers)
        ]

    def parts(self) -> list[tuple[int, dict[str, float]]]:
        answers = self.crew.ask([{"do": "parts"}] * self.layout.topology.ranks)
        return [(steps, seconds) for steps, seconds in answers]

    def stage(self, moves: Sequence[Move], start: int, stop: int) -> None:
        plain = [astuple(move) for move in moves]
        self._tell({"do": "stage", "moves": plain, "start": start, "stop": stop}, "a move of experts")

    def checksums(self, moves: Sequence[Move]) -> list[tuple[int, int]]:
        plain = [astuple(move) for move in moves]
        return matched(moves, self._tell({"do": "checksums", "moves": plain}, "a move of experts"))

    def commit(self, moves: Sequence[Move], placement: Placement) -> None:
        plain = [astuple(move) for move in moves]
        changed = {m.layer: placement.slots_LRS[placement.row_of(m.layer)].tolist() for m in moves}
        self._tell({"do": "commit", "moves": plain, "slots": changed}, "a move of experts")

    def _tell(self, message: dict[str, Any], during: str) -> list[Any]:
        return self.crew.ask([message] * self.layout.topology.ranks, during)

    def reset(self) -> None:
        self.resets += 1
        self.crew.ask([{"do": "reset"}] * self.layout.topology.ranks)

    def awaited(self) -> list[int]:
        return self.crew.awaited()

    def place(self, rank: int) -> dict[str, Any]:
        return self.crew.place(rank)

    def on_failure(self, callback: Callable[[str], None]) -> None:
        self.crew.on_failure(callback)

    def close(self) -> None:
        self._end()


def assemble(
    launcher: Launcher,
    program: str,
    specs: Sequence[Spec],
    topology: Topology,
    timeout: float,
    progress: Progress | None = None,
    agree: Agree = lambda places: {},
) -> tuple[Crew, list[dict[str, Any]]]:
    """Start ranks whose program is a `worker.RankProcess`, and have them meet. agree: from what they say of themselves
    to what all are told when they meet. Returns also where each is: host, interface, and the address and port that
    others reach. Where it fails, nothing is left, nor of the launcher."""
    try:
        crew = Crew(launcher, program, specs, topology, timeout, progress)
    except BaseException:
        launcher.close()
        raise
    try:
        return crew, _introduce(crew, agree)
    except BaseException:
        crew.close()
        raise


def tell_standings(crew: Crew) -> None:
    """On SIGUSR1 this process says where its ranks stand. For the main thread."""
    tell_on_signal(lambda: "\n".join(crew.stands()), at_once=False)


def _introduce(crew: Crew, agree: Agree) -> list[dict[str, Any]]:
    """Tell every rank where the others are, and wait until each is connected with those that it talks with, and has
    begun."""
    count = len(crew.members)
    places: list[dict[str, Any]] = crew.ask([{"do": "place"}] * count)
    needed = [{name: place[name] for name in Place.__dataclass_fields__} for place in places]
    meet = {"do": "meet", "places": needed, "token": secrets.token_bytes(16)}
    crew.ask([meet | agree(places)] * count)
    return places
