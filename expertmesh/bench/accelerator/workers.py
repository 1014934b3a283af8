"""The side of who asks: processes that examine, and what became of those that did not answer."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Literal

from expertmesh.bench.accelerator.sizes import Sizes
from expertmesh.launch.channel import ChannelClosed
from expertmesh.launch.forkserver import ForkServer, Process

State = Literal["ok", "failed", "raised", "crashed", "hung", "none"]

GRACE = 2.0  # seconds in which the end of a process shows, or its stack
HALF = 1000  # letters of what libraries wrote first, and last


class Problem(Exception):
    """Something was not answered as it should be. state: any but ok; none: there is no such thing here. text: why."""

    def __init__(self, state: State, text: str) -> None:
        super().__init__(text)
        self.state, self.text = state, text


class Workers:
    """Processes that are asked together. After a problem that is not "none" they are of no use any more."""

    def __init__(
        self, server: ForkServer, program: str, kind: str, ranks: int, sizes: Sizes, folder: Path
    ) -> None:
        """folder: for what libraries write."""
        self.sizes = sizes
        self.logs = [folder / f"{time.monotonic_ns()}-{rank}" for rank in range(ranks)]
        specs = [
            {"kind": kind, "rank": rank, "ranks": ranks, "sizes": asdict(sizes), "log": str(log)}
            for rank, log in enumerate(self.logs)
        ]
        self.processes = server.start(program, specs)

    def ask(self, message: dict[str, Any]) -> list[Any]:
        """The same of all; what each answered."""
        for rank, process in enumerate(self.processes):
            try:
                process.channel.send(message)
            except ChannelClosed:
                raise self._lost(rank, process) from None
        waiting, answers = set(range(len(self.processes))), dict[int, Any]()
        end = time.monotonic() + self.sizes.limit
        with DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(process.channel, EVENT_READ, rank)
            while waiting:
                events = selector.select(max(0.0, end - time.monotonic()))
                if not events:
                    raise self._silent(min(waiting))
                for key, _ in events:
                    answers[key.data] = self._hear(key.data)
                    waiting.discard(key.data)
        return [answers[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(GRACE)
            process.channel.close()
        for log in self.logs:
            log.unlink(missing_ok=True)

    def _hear(self, rank: int) -> Any:
        process = self.processes[rank]
        try:
            answer = process.channel.receive()
        except (ChannelClosed, ValueError):
            raise self._lost(rank, process) from None
        if "none" in answer:
            raise Problem("none", answer["none"])
        for state in ("failed", "raised"):
            if state in answer:
                raise Problem(state, self._of(rank) + answer[state])
        return answer["done"]

    def _lost(self, rank: int, process: Process) -> Problem:
        status = process.wait(GRACE)
        names = {each.value: each.name for each in signal.Signals}
        how = "it closed its connection"
        if status is not None:
            how = (
                f"killed by {names.get(-status, -status)}"
                if status < 0
                else f"it exited with status {status}"
            )
        return Problem("crashed", f"{self._of(rank)}the process died: {how}{self._tail(rank)}")

    def _silent(self, rank: int) -> Problem:
        with suppress(ValueError):
            self.processes[rank].kill(signal.SIGUSR1)
            time.sleep(GRACE / 4)
        return Problem("hung", f"{self._of(rank)}no answer in {self.sizes.limit:g} s{self._tail(rank)}")

    def _of(self, rank: int) -> str:
        return f"card {rank}: " if len(self.processes) > 1 else ""

    def _tail(self, rank: int) -> str:
        with suppress(OSError):
            text = self.logs[rank].read_text(encoding="utf-8", errors="replace").strip()
            text = text.partition("\nExtension modules:")[
                0
            ]  # of the interpreter's stack, which is before that
            if len(text) > 2 * HALF:
                text = f"{text[:HALF]} ... {text[-HALF:]}"
            return f"; it wrote: {text}" if text else ""
        return ""


class Examiner:
    """One process after another, each until it has a problem: what is asked next is asked of a new one."""

    def __init__(self, server: ForkServer, program: str, kind: str, sizes: Sizes, folder: Path) -> None:
        self._start: Callable[[], Workers] = lambda: Workers(server, program, kind, 1, sizes, folder)
        self._now: Workers | None = None

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """What was found, with its state, and why where that is not "ok"."""
        self._now = self._now or self._start()
        try:
            found = self._now.ask(message)[0]
        except Problem as problem:
            if problem.state not in ("none", "failed"):
                self.close()
            return {"state": problem.state, "why": problem.text}
        return {"state": "ok", "why": "", **found}

    def close(self) -> None:
        if self._now is not None:
            self._now.close()
        self._now = None


def collectively(workers: Workers, messages: Sequence[dict[str, Any]]) -> list[tuple[State, str, list[Any]]]:
    """State, reason and answers of each message, in order; after a problem the rest is not asked."""
    found: list[tuple[State, str, list[Any]]] = []
    try:
        for message in messages:
            found.append(("ok", "", workers.ask(message)))
    except Problem as problem:
        found.append((problem.state, problem.text, []))
        found += [("failed", "not asked: what came before has failed", [])] * (len(messages) - len(found))
    finally:
        workers.close()
    return found
