"""Messages over a stream socket.

A message is plain data: None, bool, int of 64 bits, float, str, bytes, and lists and dicts of these; a dict's keys are
str, bytes or int. A tuple arrives as a list. On the wire it is its length in 4 bytes, big-endian, and its msgpack
encoding: unlike pickle, nothing that arrives can run.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import msgpack

HEADER = struct.Struct("!I")  # in this order a letter first, as in other protocols, is above any limit
MAX_MESSAGE = 1 << 30  # bytes
CHUNK = 64  # descriptors that are sent together; Linux takes up to 253


class ChannelClosed(ConnectionError):
    """The other end is gone, or this one was closed."""


class Channel:
    """Sends and receives messages. Takes over a connected socket (AF_UNIX or TCP) and makes it blocking.

    Any thread may send; one at a time may receive. limit: bytes of a message, also of one that is received.
    """

    def __init__(self, connection: socket.socket, limit: int = MAX_MESSAGE) -> None:
        connection.setblocking(True)
        self._socket = connection
        self.limit = min(limit, MAX_MESSAGE)
        self._sending = threading.Lock()

    def bound_sending(self, seconds: float) -> None:
        """From now on a message that the other side does not take for so long is given up, and the channel closed."""
        self._bound(socket.SO_SNDTIMEO, seconds)

    def bound_receiving(self, seconds: float) -> None:
        """From now on a message that does not come for so long closes the channel; 0: wait for ever."""
        self._bound(socket.SO_RCVTIMEO, seconds)

    @property
    def address(self) -> str:
        """This end's address, "" where it has none."""
        name = self._socket.getsockname()
        return str(name[0]) if self._socket.family == socket.AF_INET else ""

    def _bound(self, option: int, seconds: float) -> None:
        whole, rest = divmod(seconds, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(rest * 1e6)))

    def send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and behind it copies of open descriptors (AF_UNIX only), which the other side must take
        with `receive_descriptors`.

        TypeError, ValueError, OverflowError: it is not plain data, or longer than the limit; nothing was sent.
        ChannelClosed: it did not get through. What has arrived here can still be received.
        """
        body = msgpack.packb(message)
        if len(body) > self.limit:
            raise ValueError(f"a message of {len(body)} bytes is above the channel's limit of {self.limit}")
        with self._sending:
            try:
                self._socket.sendall(HEADER.pack(len(body)) + body)
                for first in range(0, len(descriptors), CHUNK):
                    socket.send_fds(self._socket, [b"\0"], list(descriptors[first : first + CHUNK]))
            except BaseException as error:
                # Part of it may be on its way, and nothing behind it could be understood.
                self._shut(socket.SHUT_WR)
                if isinstance(error, OSError):
                    raise ChannelClosed(f"the channel is closed ({error})") from error
                raise

    def receive(self) -> Any:
        """The next message.

        ChannelClosed: there is none any more, or only the beginning of one. ValueError: what came is no message, and
        the channel is closed when it is one above the limit. An exception from a signal handler (KeyboardInterrupt)
        between two messages leaves the channel as it was; in the middle of one it closes it.
        """
        (size,) = HEADER.unpack(self._read(HEADER.size))
        if size > self.limit:
            self.close()
            raise ValueError(
                f"a message of {size} bytes arrives, above the channel's limit of {self.limit}; closed"
            )
        return msgpack.unpackb(self._read(size, begun=True), strict_map_key=False)

    def receive_descriptors(self, count: int) -> list[int]:
        """The descriptors behind the message just received. OSError where this process cannot hold so many: it then
        has none of them, and the channel goes on."""
        found: list[int] = []
        for first in range(0, count, CHUNK):
            size = min(CHUNK, count - first)
            data, some, _, _ = socket.recv_fds(self._socket, 1, size)
            if not data:
                raise ChannelClosed("the channel was closed in front of descriptors")
            found += some
        for descriptor in found:
            os.set_inheritable(descriptor, False)  # recv_fds ignores the flag for it
        if len(found) < count:
            for descriptor in found:
                os.close(descriptor)
            raise OSError(f"{count} descriptors came and {len(found)} fit under the limit of open files")
        return found

    def fileno(self) -> int:
        """The socket's descriptor, for select and poll; -1 after close."""
        return self._socket.fileno()

    def close(self) -> None:
        """End both directions, also for threads that wait in `receive`, and close the socket."""
        self._shut(socket.SHUT_RDWR)
        self._socket.close()

    def detach(self) -> int:
        """Give up the socket and return its descriptor. A process that got it by a fork closes its copy so: `close`
        would end the connection for the others too."""
        return self._socket.detach()

    def _read(self, size: int, begun: bool = False) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        try:
            while rest:
                count = self._socket.recv_into(rest)
                if count == 0:
                    where = " in the middle of a message" if begun or len(rest) < size else ""
                    raise ChannelClosed(f"the channel was closed{where}")
                rest = rest[count:]
        except BaseException as error:
            if begun or len(rest) < size:
                self.close()  # the rest of this message would be taken for the next one
            if isinstance(error, OSError) and not isinstance(error, ChannelClosed):
                raise ChannelClosed(f"the channel is closed ({error})") from error
            raise
        return data

    def _shut(self, direction: int) -> None:
        with contextlib.suppress(OSError):  # it is not connected any more
            self._socket.shutdown(direction)


class FirstMessage:
    """What somebody says first who may be a stranger, read as it comes: nobody has to wait for the rest of it."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        """limit: bytes of the message; of a longer one no more is read than its length."""
        connection.setblocking(False)
        self._socket, self._limit = connection, limit
        self._data = bytearray()

    def comes(self) -> bool:
        """Read what is there of it; whether more of it is to come."""
        try:
            some = self._socket.recv(self._size - len(self._data))
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._data += some
        return bool(some) and len(self._data) < self._size <= HEADER.size + self._limit

    def content(self) -> Any:
        """ValueError where it has not come whole, or is no message."""
        if len(self._data) < self._size:
            raise ValueError("only the beginning of a message has come")
        return msgpack.unpackb(self._data[HEADER.size :], strict_map_key=False)

    @property
    def _size(self) -> int:
        """As far as that is known."""
        return HEADER.size + (HEADER.unpack_from(self._data)[0] if len(self._data) >= HEADER.size else 0)
