"""Where the ranks of a running engine stand: its driver says it to whoever asks on this machine, and a process says
where it is on SIGUSR1. Both also while it computes or waits.

A driver listens on a socket in Linux's abstract namespace, which leaves no file behind and is seen in the network
namespace of the driver only.
"""

import contextlib
import os
import re
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertmesh.launch.channel import Channel, ChannelClosed

PREFIX = "expertmesh-driver"
PATIENCE = 5.0  # seconds that a driver has to answer
CREDENTIALS = struct.Struct("@iII")  # pid, uid, gid

Answer = Callable[[], dict[str, Any]]


class Inquiries:
    """Answers this user, and root, until it is closed."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"\0{PREFIX}-{os.getpid()}-{secrets.token_hex(4)}")
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, name="inquiries", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Again: nothing."""
        with contextlib.suppress(OSError):  # wakes the thread
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(PATIENCE)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            channel = Channel(connection)
            channel.bound_sending(PATIENCE)
            if peer(connection)[1] in (0, os.geteuid()):
                with contextlib.suppress(ChannelClosed):
                    channel.send(self._answer())
            channel.close()


def drivers(table: Path) -> dict[str, int]:
    """Names of the sockets of drivers, and their processes, in a network namespace; table: its /proc/.../net/unix."""
    found = re.findall(rf" @({PREFIX}-(\d+)-[0-9a-f]+)$", table.read_text(), re.MULTILINE)
    return {name: int(pid) for name, pid in found}


def ask(name: str) -> dict[str, Any]:
    """What the driver with this socket answers, of this network namespace. OSError where it does not, or is another
    user's: what that says is not to be believed, unless root asks."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    channel = Channel(connection)
    try:
        channel.bound_sending(PATIENCE)  # connecting too
        connection.connect(f"\0{name}")
        if os.geteuid() not in (0, peer(connection)[1]):
            raise PermissionError("it is another user's")
        channel.bound_receiving(PATIENCE)
        answer: dict[str, Any] = channel.receive()
        return answer
    finally:
        channel.close()


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _ = CREDENTIALS.unpack(data)
    return pid, uid


def tell_on_signal(text: Callable[[], str], at_once: bool) -> None:
    """On SIGUSR1 this process writes what text() says to its standard error. For the main thread.

    A thread does it, so that nothing which the main thread is in the middle of can be in the way. at_once: also where
    that is not in Python for long; this takes the only `signal.set_wakeup_fd` of the process.
    """
    out, bell = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(bell, False)

    def ring(*_: object) -> None:
        with contextlib.suppress(BlockingIOError):  # enough of them are waiting
            os.write(bell, bytes([signal.SIGUSR1]))

    def listen() -> None:
        while numbers := os.read(out, 64):
            if signal.SIGUSR1 in numbers:
                with contextlib.suppress(OSError):  # in one piece: others write at the same time
                    os.write(2, f"{text()}\n".encode())

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.signal(signal.SIGUSR1, (lambda *_: None) if at_once else ring)
    if at_once:
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
