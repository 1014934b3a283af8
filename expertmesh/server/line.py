"""The engine's end of the connection to the process that speaks HTTP."""

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

from expertmesh.launch.channel import Channel, ChannelClosed
from expertmesh.server.frames import Frame

LAST = 5.0  # seconds in which what was said last has to be taken


class Line:
    """Frames to and from the other process, each way in a thread of its own: no step waits for either."""

    def __init__(self, channel: Channel, hear: Callable[[Frame], None]) -> None:
        """hear: is called in a thread with each frame, and last with one that says "gone"."""
        self._channel, self._hear = channel, hear
        self._outbox: SimpleQueue[Frame | None] = SimpleQueue()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._listen, self._speak)]
        for thread in self._threads:
            thread.start()

    def send(self, frame: Frame) -> None:
        """Any thread may; what does not get through is lost, and the other process with it."""
        self._outbox.put(frame)

    def close(self) -> None:
        """When what was sent has gone out."""
        self._outbox.put(None)
        self._threads[1].join(LAST)
        self._channel.close()

    def _listen(self) -> None:
        with contextlib.suppress(ChannelClosed):
            while True:
                self._hear(self._channel.receive())
        self._hear({"do": "gone"})

    def _speak(self) -> None:
        with contextlib.suppress(ChannelClosed):
            while (frame := self._outbox.get()) is not None:
                self._channel.send(frame)
