"""The processes of a cluster as their driver sees them: one message to each, one answer from each.

A thread listens to all of them, also while nothing is asked: a rank that dies, fails or falls silent ends all, and one
message names it.
"""

import contextlib
import math
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from expertmesh.errors import RankFailure
from expertmesh.launch.channel import ChannelClosed
from expertmesh.launch.duty import COMPUTING
from expertmesh.launch.inquiry import Inquiries
from expertmesh.launch.launcher import Launcher, Member, Spec
from expertmesh.mesh.topology import Topology

GRACE = 2.0  # seconds that a rank has to end when it is told to, and that the cause of a failure has to show
LAST_WORD = 0.2  # seconds in which a rank has to take the message that tells it to end
BEATS = 5  # messages to every rank in the time after which it counts as silent
DUMP = 2.0  # seconds that a rank has to say where it stands


class Crew:
    """Starts the ranks. Not thread-safe, but for `failure`, `stands` and `close`."""

    def __init__(
        self,
        launcher: Launcher,
        program: str,
        specs: Sequence[Spec],
        topology: Topology,
        timeout: float,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """specs: one for each rank. timeout: seconds after which a rank that does not answer has failed; computing is
        no reason not to. progress: is told, in a thread, how much of what there is all ranks have done of what they say
        (`Duty.tell_progress`). RankFailure where one does not come."""
        self._progress, self._done = progress, dict[int, tuple[int, int]]()
        self.topology, self.timeout = topology, timeout
        self.during = "the start"  # what is being done, for messages
        self.failure: str | None = None
        self._failed: str | None = None  # the same, but where the crew was closed or broken off
        self._launcher = launcher
        self._closing = False
        self._callbacks: list[Callable[[str], None]] = []
        common = {"speaks": launcher.apart, "silence": timeout if launcher.apart else None}
        named = [{"name": name_of(rank, topology)} | common | spec for rank, spec in enumerate(specs)]
        self.members = launcher.start(program, named, timeout)
        for member in self.members:
            # A live rank reads at any time: what it does not take at once is not even sent for half the time.
            member.channel.bound_sending(timeout / 2)
            # What it has begun to say it says to the end: the listener waits for that, and hears nobody else. Nor does
            # it speak to the others, which leave when they do not hear it for `timeout`.
            member.channel.bound_receiving(timeout / 2)
        self._news = threading.Condition()
        self._answers: dict[int, Any] = {}
        self._stands: dict[int, str] = {}
        self._witnesses: dict[int, str] = {}
        self._suspects: set[int] = set()
        self._grace: float | None = None  # when the cause of a failure has to have shown
        self._heard = dict.fromkeys(range(len(self.members)), time.monotonic())
        self._asked = math.inf  # when the ranks were asked something that they have not all answered
        # What each rank does, and since when it does just that.
        self._state: dict[int, tuple[Any, float]] = {}
        self._bell, self._ears = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()
        self._inquiring = threading.Lock()
        self._inquiries = Inquiries(lambda: {"during": self.during, "ranks": self.standings()})

    def ask(self, messages: Sequence[Spec], during: str | None = None) -> list[Any]:
        """One message to every rank, and every rank's answer. Whatever breaks in between ends all: ranks that are not
        at the same point would answer something else the next time."""
        self.during = during or self.during
        if self.failure is not None:
            raise RankFailure(self.failure)
        try:
            self._answers.clear()
            self._asked = time.monotonic()
            for member, message in zip(self.members, messages, strict=True):
                try:
                    member.channel.send(message | {"during": self.during})
                except ChannelClosed:
                    self._lost(member)
            with self._news:
                # In short waits, so that a signal is seen.
                while len(self._answers) < len(self.members) and self.failure is None:
                    self._news.wait(1.0)
        except BaseException as error:
            self._end(self.failure or f"the engine was broken off in {self.during}: {error!r}")
            raise
        if self.failure is not None:
            raise RankFailure(self.failure)
        self._asked = math.inf
        return [self._answers[rank] for rank in range(len(self.members))]

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Call this with the message when all have ended because one has failed, in another thread; at once where that
        was before."""
        with self._news:
            if not self._failed:
                self._callbacks.append(callback)
                return
        callback(self._failed)

    def awaited(self) -> list[int]:
        """Ranks that have not answered what was asked last, first those that have not been heard for longest: others
        may only wait for them. Any thread may ask."""
        silent = [m.rank for m in self.members if self._asked < math.inf and m.rank not in self._answers]
        return sorted(silent, key=lambda rank: self._heard[rank])

    def place(self, rank: int) -> dict[str, Any]:
        """Rank, node, card and host as plain data."""
        return place_of(rank, self.topology, self.members[rank].host)

    def describe(self, rank: int) -> str:
        """A rank as messages name it."""
        return f"{name_of(rank, self.topology)} on {self.members[rank].host}"

    def silence(self) -> list[float]:
        """Seconds since each rank was last heard. Any thread may ask."""
        now = time.monotonic()
        return [max(0.0, now - self._heard[rank]) for rank in range(len(self.members))]

    def stands(self) -> list[str]:
        """Where each rank stands at the moment, by its own account."""
        return [
            f"{r['name']}, process {r['process']}, {self.during}: {r['stands']}" for r in self.standings()
        ]

    def standings(self) -> list[dict[str, Any]]:
        """The same as plain data. Any thread may ask."""
        with self._inquiring:
            with self._news:
                self._stands.clear()
            for member in self.members:
                with contextlib.suppress(ChannelClosed):
                    member.channel.send({"do": "dump"})
            with self._news:
                self._news.wait_for(
                    lambda: len(self._stands) == len(self.members) or self.failure is not None, DUMP
                )
                said = dict(self._stands)
        silent = self.failure or f"does not answer within {DUMP:g} s"
        return [
            {
                **self.place(rank),
                "name": self.describe(rank),
                "process": member.pid,
                "stands": said.get(rank, silent),
            }
            for rank, member in enumerate(self.members)
        ]

    def close(self) -> None:
        """End all ranks. Again: nothing."""
        self._end("the engine is closed")
        if threading.current_thread() is self._thread:
            return  # what a callback asks for is done by who closes later
        self._thread.join()
        self._inquiries.close()
        self._launcher.close()
        for member in self.members:
            member.channel.close()
        self._bell.close()
        self._ears.close()

    # The listener's thread

    def _listen(self) -> None:
        """Until all have ended: nobody would see a failure any more without this thread."""
        try:
            self._attend()
        except Exception as error:
            if self.failure is not None:
                raise  # of a callback: all has been done
            self._end(
                f"the driver cannot go on in {self.during}: {type(error).__name__}: {error}", failed=True
            )

    def _attend(self) -> None:
        beat = self.timeout / BEATS
        with selectors.DefaultSelector() as selector:
            selector.register(self._ears, selectors.EVENT_READ, None)
            for rank, member in enumerate(self.members):
                selector.register(member.channel, selectors.EVENT_READ, rank)
            due = time.monotonic() + beat
            while self.failure is None:
                now = time.monotonic()
                for event, _ in selector.select(max(0.0, min(due, self._grace or due) - now)):
                    if event.data is not None and self.failure is None:
                        self._hear(event.data)
                now = time.monotonic()
                if self._grace is not None and now >= self._grace:
                    self._blame()
                if now >= due:
                    if now - due > self.timeout / 2:
                        # This process has been stopped, and so has heard nobody.
                        self._heard = dict.fromkeys(self._heard, now)
                    due = now + beat
                    self._check_silence(now)

    def _hear(self, rank: int) -> None:
        """Read what one rank says."""
        self._heard[rank] = time.monotonic()
        try:
            message = self.members[rank].channel.receive()
        except (ChannelClosed, ValueError):
            self._lost(self.members[rank])
            return
        if "failed" in message and message["suspects"] is None:
            self._fail(rank, f"failed in {self.during}: {message['failed']}")
            return
        with self._news:
            if "done" in message:
                self._answers[rank] = message["done"]
            elif "pong" in message:
                if rank not in self._state or self._state[rank][0] != message["pong"]:
                    self._state[rank] = message["pong"], self._heard[rank]
            elif "progress" in message:
                self._done[rank] = tuple(message["progress"])
                if self._progress is not None:
                    self._progress(*map(sum, zip(*self._done.values(), strict=True)))
            elif "stands" in message:
                self._stands[rank] = message["stands"]
            elif "failed" in message:  # because of another one, as a rule: wait a moment to hear of that
                self._witnesses[rank] = message["failed"]
                self._suspects |= set(message["suspects"])
                self._grace = self._grace or time.monotonic() + GRACE
            self._news.notify_all()

    def _check_silence(self, now: float) -> None:
        """A rank may compute as long as it likes, but it has a thread that answers. Who does not has failed."""
        silent = [rank for rank, heard in self._heard.items() if now - heard > self.timeout]
        if not silent:
            self._check_stall(now)
            self._ping()
            return
        # Others of its node may be silent for a moment less.
        node = self.topology.node_ranks(silent[0])
        first, *others = [rank for rank in node if now - self._heard[rank] > self.timeout / 2]
        also = ""
        if self._launcher.apart and self.topology.nodes > 1 and len(others) == len(node) - 1:
            also = ", nor does any other rank of its node" if others else ""
            also += ": its link is cut or the machine is down"
        self._fail(first, f"does not answer any more in {self.during}, for {self.timeout:g} s now{also}")

    def _ping(self) -> None:
        for member in self.members:
            with contextlib.suppress(ChannelClosed):  # seen when its channel is read
                member.channel.send({"do": "ping"})

    def _check_stall(self, now: float) -> None:
        """Ranks that all hear the driver, and wait for each other while nothing comes through and none computes."""
        waiting = {r: state for r, (state, _) in self._state.items() if isinstance(state, list)}
        still = all(now - max(self._state[r][1], self._asked) > self.timeout for r in waiting)
        if not waiting or not still or any(state == COMPUTING for state, _ in self._state.values()):
            return
        # Whoever is behind the others holds them up; of several, two that wait for each other.
        pairs = [(a, b) for a, (_, awaited, _) in waiting.items() for b in awaited]
        first = min(pairs, key=lambda pair: (waiting[pair[0]][2], pair[::-1] not in pairs), default=None)
        a, b = first or (min(waiting), None)
        of = f" of {self.describe(b)}" if b is not None else ""
        self._fail(
            a, f"has got nothing{of} in {self.during}, for {self.timeout:g} s now, though both answer: the link "
            "between them is broken"
        )  # fmt: skip

    def _lost(self, member: Member) -> None:
        """A rank's channel has ended."""
        self._ping()  # the others do not wait in vain while its end is waited for
        status = member.wait(GRACE)
        if status is not None and status < 0:
            names = {each.value: f" ({each.name})" for each in signal.Signals}  # real-time signals have none
            how = f"died in {self.during}: killed by signal {-status}{names.get(-status, '')}"
        elif status is not None:
            how = f"died in {self.during}: it exited with status {status}"
        elif member.process is not None:
            how = f"does not answer any more in {self.during}"
        else:
            how = f"died in {self.during}: it closed its connection"
        self._fail(member.rank, f"{how}, process {member.pid}")

    def _blame(self) -> None:
        """The time in which the cause of a failure shows is over."""
        witness, problem = next(iter(self._witnesses.items()))
        suspects = sorted(self._suspects - self._witnesses.keys())
        if suspects:
            self._fail(
                suspects[0],
                f"has been computing {self.during} for so long that the others gave up (rank {witness} {problem})",
            )
        else:
            self._fail(witness, f"could not go on in {self.during}: {problem}")

    def _fail(self, rank: int, cause: str) -> None:
        self._end(f"{self.describe(rank)} {cause}; all ranks have been stopped", failed=True)

    def _end(self, why: str, failed: bool = False) -> None:
        """Once: end all ranks, by force where they do not listen."""
        with self._news:
            if self._closing:
                return
            self._closing = True
        try:
            self._stop({"because": why} if failed else {})
        finally:  # whatever that meets: others wait for this
            with self._news:
                self.failure = why
                self._news.notify_all()
            with contextlib.suppress(OSError):
                self._bell.send(b"\0")
            if failed:
                with self._news:
                    self._failed = why
                for callback in self._callbacks:
                    callback(why)

    def _stop(self, because: dict[str, str]) -> None:
        # Who was heard last hears first: to send to the others may take its time.
        for member in sorted(self.members, key=lambda m: -self._heard[m.rank]):
            with contextlib.suppress(OSError):  # also where the channel is closed from here
                member.channel.bound_sending(LAST_WORD)
                member.channel.send({"do": "end"} | because)
        end = time.monotonic() + GRACE
        for member in self.members:
            if member.wait(max(0.0, end - time.monotonic())) is None:
                member.kill()
        for member in self.members:
            member.wait(GRACE)


def place_of(rank: int, topology: Topology, host: str) -> dict[str, Any]:
    """The same as plain data."""
    return {"rank": rank, "node": topology.node_of(rank), "card": topology.card_of(rank), "host": host}


def name_of(rank: int, topology: Topology) -> str:
    return f"rank {rank} (node {topology.node_of(rank)}, card {topology.card_of(rank)})"
