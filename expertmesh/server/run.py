"""Running a server: its two processes, and what ends them.

The process that was started keeps the engine, in its main thread; `front` is its child, which speaks HTTP. They hold
the ends of one connection, and each ends when the other one has ended, in whatever way.
"""

import contextlib
import ctypes
import errno
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from expertmesh.errors import InputError
from expertmesh.launch.channel import Channel, ChannelClosed
from expertmesh.server.frames import Frame
from expertmesh.server.line import Line
from expertmesh.server.settings import Settings

FORCE = 10.0  # seconds after which the other process is killed, when it should have ended
HANDLED = (signal.SIGINT, signal.SIGTERM)


M_ARENA_MAX = -8  # of mallopt (malloc.h)


def share_memory() -> None:
    """Let all threads of this process allocate from one arena. glibc gives each thread its own, and takes nothing back
    from one for another: with a rank in each of 8 threads a server grew by a fifth in 5,000 requests."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class FrontEnded(RuntimeError):
    """The process that speaks HTTP has ended, and nobody has told it to."""


class Stopped(BaseException):
    """A signal has told this process to end while a model was being loaded."""


class Server:
    """The other process, and the signals to this one, in a block; for the main thread.

    In it `loading` is told how far loading is, and `attach` gives frames and stops to who runs the engine. The first
    SIGINT or SIGTERM is a stop; before anybody is attached it raises Stopped, and the block ends. The second one ends
    this process at once, as each signal does by itself. FrontEnded, InputError: the other process has ended, or cannot
    serve this model.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings, self._listener = settings, listener
        self._put: Callable[[Frame], None] | None = None
        self._early: list[Frame] = []
        self._lock = threading.Lock()
        self._signals = 0
        self._woken = False  # the next signal is this process's own, to get out of loading

    def __enter__(self) -> "Server":
        near, far = socket.socketpair()
        command = [sys.executable, "-m", "expertmesh.server.front", str(far.fileno())]
        self._before = {number: signal.signal(number, self._signalled) for number in HANDLED}
        # In a session of its own, where a terminal's Ctrl-C does not reach it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[far.fileno()], start_new_session=True
        )
        far.close()
        channel = Channel(near)
        with contextlib.suppress(ChannelClosed), self._listener:
            channel.send(self.settings.plain(), [self._listener.fileno()])
        self._line = Line(channel, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        with self._lock:
            self._put = _ignore  # that the other process ends is what is wanted now
        if kind in (KeyboardInterrupt, SystemExit):
            self._process.kill()
        self.send({"do": "drain", "grace": 0.0})
        self._line.close()
        try:
            self._process.wait(FORCE)
        except BaseException:
            self._process.kill()
            self._process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return kind is Stopped

    def send(self, frame: Frame) -> None:
        self._line.send(frame)

    def loading(self, done: int, total: int) -> None:
        self.send({"do": "loading", "done": done, "total": total})

    def attach(self, put: Callable[[Frame], None]) -> None:
        """From now on frames of the other process go there, and {"do": "drain"} where this one is told to stop. Those
        that came before too."""
        with self._lock:
            self._put, early = put, self._early
        for frame in early:
            put(frame)
        if self._signals:
            put({"do": "drain"})

    def front_ended(self) -> FrontEnded:
        """What to raise when the other process has ended by itself."""
        status = self._process.wait(FORCE)
        how = f"killed by signal {-status}" if status < 0 else f"status {status}"
        return FrontEnded(f"the process that speaks HTTP has ended ({how}), and so does the server")

    # The thread of the line

    def _hear(self, frame: Frame) -> None:
        with self._lock:
            put = self._put
            if put is None:
                self._early.append(frame)
        if put is not None:
            put(frame)
        elif frame["do"] in ("gone", "refused"):  # loading is in vain, and the main thread may be deep in it
            self._woken = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    # Signals, in the main thread

    def _signalled(self, number: int, _: Any) -> None:
        if self._woken:
            self._woken = False
            if self._put is None:
                self._give_up(self._early[0])
            return
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if self._put is None:
            raise Stopped
        self._put({"do": "drain"})

    def _give_up(self, frame: Frame) -> None:
        if frame["do"] == "refused":
            raise InputError(frame["message"])
        raise self.front_ended()


def _ignore(frame: Frame) -> None:
    """There is nobody any more whom it concerns."""


def listen(host: str, port: int) -> socket.socket:
    """InputError where that is not possible here."""
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} is not from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} on {host} is in use; stop what listens there or take another port"
            ) from None
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def url_of(listener: socket.socket, settings: Settings) -> str:
    """Where clients find the API."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"


def check_tls(cert: str | None, key: str | None) -> None:
    """InputError where these files are no certificate with its private key."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise InputError("--tls-cert and --tls-key go together: a certificate, and its private key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise InputError(f"{name} {path}: {error.strerror}") from None
    try:
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"--tls-cert {cert}, --tls-key {key}: not a certificate and its private key, without a password, in PEM "
            f"form ({reason})"
        ) from None
