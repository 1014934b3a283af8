"""Programs on the machines of an emulated cluster: the process that asks for them, in front of their keeper."""

import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import psutil

from expertmesh.emulation.cluster import Node
from expertmesh.emulation.keeper import BOOT, LIMIT, become_subreaper, end_descendants
from expertmesh.errors import InputError
from expertmesh.launch.channel import Channel, ChannelClosed

GRACE = 15.0  # seconds that programs have to end in after a signal
AGAIN = 1.0  # seconds within which a second signal means that it is urgent
LONGEST_LINE = 65_536  # bytes; a longer one is passed on in pieces
PIECE = 65_536  # bytes that are read at once
HANDLED = (signal.SIGINT, signal.SIGTERM)


class EmulationFailed(RuntimeError):
    """The emulated cluster has broken down, and all in it has been ended; the message says by what."""


@dataclass(frozen=True)
class Program:
    """Words to run on the node of this number, and what they find added to the environment."""

    node: int
    words: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Event:
    """So many seconds after the start of programs: "cut" a node off, or "kill" a program, by their numbers."""

    what: str
    number: int
    seconds: float


class Emulation:
    """An emulated cluster, and programs in it. However this process ends, nothing of it is left.

    `shared`: for one program, which reads and writes what this process does, a terminal perhaps. Otherwise programs
    have an empty input, and each line of theirs comes out behind the name of the node.

    InputError: no cluster can be made here. EmulationFailed.
    """

    def __init__(self, nodes: int, rate: int, delay: float, shared: bool) -> None:
        self._shared = shared
        self._others = {child.pid for child in psutil.Process().children()}
        self._was_subreaper = become_subreaper()
        near, far = socket.socketpair()
        self._channel = Channel(near)
        with far:
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(far.fileno()), *sys.path],
                stdin=None if shared else subprocess.DEVNULL, pass_fds=[far.fileno()], start_new_session=True,
            )  # fmt: skip
        try:
            self._send({"nodes": nodes, "rate": rate, "delay": delay})
            self.nodes = [Node(**node) for node in self._receive()["nodes"]]
        except BaseException:
            self.close()
            raise

    def run(self, programs: Sequence[Program], agenda: Sequence[Event]) -> int:
        """Once: run them until all have ended.

        The first exit code by time that is not 0, or 128 + N after signal N. Programs that the agenda has killed do
        not count; where it has killed all, 137. InputError: one cannot be started. EmulationFailed.
        """
        with contextlib.ExitStack() as stack:
            lines: dict[int, _Lines] = {}
            ends: list[int] = []
            with contextlib.ExitStack() as sent:
                for program in () if self._shared else programs:
                    for stream in (sys.stdout, sys.stderr):
                        out, end = os.pipe2(os.O_CLOEXEC)
                        stack.callback(os.close, out)
                        sent.callback(os.close, end)
                        ends.append(end)
                        lines[out] = _Lines(f"[{self.nodes[program.node].host}] ".encode(), stream.buffer)
                events = [[event.what, event.number, event.seconds] for event in agenda]
                plan = {"programs": [asdict(p) for p in programs], "agenda": events, "outputs": len(ends)}
                self._send(plan, ends)
            try:
                statuses = self._attend(lines)
            finally:
                for out, output in lines.items():  # what they said before they ended
                    os.set_blocking(out, False)
                    while output.pass_on(out):
                        pass
        codes = [128 - status if status < 0 else status for status in statuses]
        return next((code for code in codes if code), 0) if codes else 128 + signal.SIGKILL

    def close(self) -> None:
        """Kill everything in it. Again: nothing."""
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(LIMIT + GRACE)
        self._keeper.kill()
        self._keeper.wait()
        # Nothing, unless the keeper did not live to do it.
        end_descendants(lambda pid: pid not in self._others, _reap)
        become_subreaper(self._was_subreaper)

    def __enter__(self) -> "Emulation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attend(self, lines: dict[int, "_Lines"]) -> list[int]:
        """The statuses of programs that have ended by themselves, by time."""
        statuses: list[int] = []
        with selectors.DefaultSelector() as selector, _caught() as signals:
            for source in (self._channel.fileno(), signals, *lines):
                selector.register(source, selectors.EVENT_READ)
            urge = _Urge(self._channel, lasting=self._shared)
            while True:
                for key, _ in selector.select(urge.left()):
                    if key.fd == signals:
                        for number in os.read(signals, PIECE):
                            urge.pass_on(number)
                    elif key.fd in lines:
                        if not lines[key.fd].pass_on(key.fd):
                            selector.unregister(key.fd)
                    else:
                        message = self._receive()
                        if message.get("done"):
                            return statuses
                        statuses += self._status(message)

    def _status(self, message: dict[str, Any]) -> list[int]:
        """Of the program that has ended, if it counts."""
        if "cut" in message:
            _say(f"{self.nodes[message['cut']].host} is cut off")
            return []
        if not self._shared and message["status"]:
            how = "was killed" if message["killed"] else f"ended with status {message['status']}"
            _say(f"the program of {self.nodes[message['ended']].host} {how}")
        return [] if message["killed"] else [message["status"]]

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        with contextlib.suppress(ChannelClosed):  # who reads from it sees that
            self._channel.send(message, descriptors)

    def _receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self._channel.receive()
        except ChannelClosed:
            raise EmulationFailed("the process that keeps the emulated cluster has died") from None
        if "refused" in message:
            raise InputError(message["refused"])
        if "failed" in message:
            raise EmulationFailed(message["failed"])
        return message


class _Urge:
    """Signals go to the programs, and what does not obey is killed.

    One that is lasting decides for itself what Ctrl-C means: in a conversation it ends an answer. Twice in a second
    is not for it to decide.
    """

    def __init__(self, channel: Channel, lasting: bool) -> None:
        self._channel, self._lasting = channel, lasting
        self._end: float | None = None
        self._last = -math.inf

    def pass_on(self, number: int) -> None:
        now = time.monotonic()
        if self._end is not None or now < self._last + AGAIN:
            self._send(signal.SIGKILL)
        elif number in HANDLED:
            self._send(number)
            self._last = now
            if not (self._lasting and number == signal.SIGINT):
                self._end = now + GRACE

    def left(self) -> float | None:
        """Seconds until it is time to look again."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            self._send(signal.SIGKILL)
            self._end = time.monotonic() + GRACE
        return max(0.0, left)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ChannelClosed):  # who reads from it sees that
            self._channel.send({"signal": int(number)})


class _Lines:
    """Passes on what comes, in whole lines, each behind a prefix."""

    def __init__(self, prefix: bytes, to: BinaryIO) -> None:
        self._prefix, self._to = prefix, to
        self._rest = b""

    def pass_on(self, source: int) -> bool:
        """What is there. False: there will be no more of it, or, where the source does not block, not now."""
        try:
            data = os.read(source, PIECE)
        except BlockingIOError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > LONGEST_LINE):
            lines.append(self._rest)
            self._rest = b""
        if lines:
            self._to.write(b"".join(self._prefix + line + b"\n" for line in lines))
            self._to.flush()
        return bool(data)


@contextlib.contextmanager
def _caught() -> Iterator[int]:
    """A descriptor that SIGINT and SIGTERM come out of, each as a byte, instead of doing anything."""
    out, bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    caught = [n for n in HANDLED if signal.getsignal(n) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
    before = signal.set_wakeup_fd(bell)
    try:
        yield out
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(out)
        os.close(bell)


def _reap(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _say(text: str) -> None:
    print(f"expertmesh: {text}", file=sys.stderr, flush=True)
