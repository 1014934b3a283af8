"""A rank's side of `launch.crew`: do what the driver says, and answer it at any time."""

import contextlib
import os
import queue
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from expertmesh.launch.channel import Channel, ChannelClosed
from expertmesh.launch.launcher import Spec

ENDED = 1  # exit status of a rank that has ended because another one failed, or that has lost the driver
PAUSE = 0.2  # seconds between two words on progress
IDLE, COMPUTING = "idle", "computing"  # what a rank does that waits for no other
# Bytes that have come or gone so far, ranks from which something is awaited, and how many exchanges have begun.
Waits = list[Any]
Obey = Callable[[Spec], Any]


class Duty:
    """What a rank owes its driver. A thread of its own listens, so that a rank that waits for others in a collective
    still hears the driver."""

    def __init__(self, spec: Spec, channel: Channel) -> None:
        """Of the spec: name; speaks: say on standard error why all have ended; silence: seconds without a word from
        the driver after which this rank gives up, None for never."""
        self.where: Callable[[], str | None] = lambda: None  # what the rank waits for, in words
        self.waits: Callable[[], Waits | None] = lambda: None  # the same, for the driver
        self._name = f"{spec['name']} on {socket.gethostname()}"
        self._channel, self._speaks, self._silence = channel, spec["speaks"], spec["silence"]
        self._told = 0.0
        self._doing: str | None = None
        self._during = "the start"
        self._inbox: queue.SimpleQueue[Spec] = queue.SimpleQueue()
        self._thread = threading.current_thread()
        threading.Thread(target=self._listen, name="driver", daemon=True).start()

    def serve(self, obey: Obey) -> None:
        """Until the driver ends this process. A failure is told to it, and it ends all ranks. An error that has
        `suspects` is what this rank has seen of the failure of others."""
        try:
            while True:
                self._doing = None
                message = self._inbox.get()
                self._doing, self._during = message["do"], message.get("during", self._during)
                self._channel.send({"done": obey(message)})
        except BaseException as error:
            suspects = getattr(error, "suspects", None)
            text = f"{type(error).__name__}: {error}" if suspects is None else str(error)
            self._channel.send({"failed": text, "suspects": None if suspects is None else list(suspects)})
            while True:  # until the driver ends this process: it may have asked for more meanwhile
                self._inbox.get()

    def tell_progress(self, done: int, total: int) -> None:
        """How far this rank is with what takes it long; not said every time."""
        now = time.monotonic()
        if done == total or now - self._told > PAUSE:
            self._told = now
            self._channel.send({"progress": [done, total]})

    def _listen(self) -> None:
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        wait = None if self._silence is None else 1000 * self._silence
        while True:
            try:
                if not poller.poll(wait):
                    self._leave(
                        f"it has not heard the driver for {self._silence:g} s, in {self._during}: the link between "
                        "them is cut, or its machine is down"
                    )
                message = self._channel.receive()
                match message["do"]:
                    case "ping":
                        idle = self._doing is None
                        self._channel.send({"pong": IDLE if idle else self.waits() or COMPUTING})
                    case "dump":
                        self._channel.send({"stands": self.stands()})
                    case "end":
                        self._leave(message.get("because"))
                    case _:
                        self._inbox.put(message)
            except ChannelClosed:
                self._leave(f"its driver has ended, in {self._during}")

    def stands(self) -> str:
        """Where the rank's thread is: what it waits for, and its stack."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = traceback.format_stack(frame)[-6:] if frame else []
        busy = "waits for the driver" if self._doing is None else f"computes ({self._doing})"
        return (self.where() or busy) + "\n" + "".join(stack).rstrip()

    def describe(self) -> str:
        """The same, with who it is and what is being done, for people."""
        return f"{self._name}, process {os.getpid()}, {self._during}: {self.stands()}"

    def _leave(self, why: str | None) -> None:
        if why is not None and self._speaks:
            with contextlib.suppress(OSError):  # in one piece: others speak at the same time
                os.write(2, f"expertmesh: {self._name} ends: {why}\n".encode())
        os._exit(0 if why is None else ENDED)
