"""For tests of emulated clusters: whether there can be one here, sockets on its nodes, and what is left of it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil
import pytest

from expertmesh.emulation.cluster import Node, require
from expertmesh.emulation.namespaces import inside
from expertmesh.errors import InputError

T = TypeVar("T")
Start: TypeAlias = Callable[..., "subprocess.Popen[str]"]
LIMIT = 60.0  # seconds after which something hangs
MARK = "EXPERTMESH_TEST_EMULATION"
EMULATE = [sys.executable, "-m", "expertmesh", "emulate"]


def why_not() -> str | None:
    try:
        require()
    except InputError as error:
        return str(error)
    return None


needs_a_cluster = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def on(node: Node, work: Callable[[], T]) -> T:
    """work() in the network of a node."""
    descriptor = os.open(node.namespace, os.O_RDONLY)
    try:
        return inside(descriptor, work)
    finally:
        os.close(descriptor)


@contextmanager
def connection(client: Node, server: Node) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of one."""
    with (
        on(server, lambda: socket.create_server((server.address, 0))) as listener,
        on(client, lambda: socket.create_connection(listener.getsockname(), LIMIT)) as near,
        listener.accept()[0] as far,
    ):
        for end in (near, far):
            end.settimeout(LIMIT)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield near, far


def transfer(near: socket.socket, far: socket.socket, size: int) -> None:
    """So many bytes from one end to the other, and a word back when they are there."""

    def take() -> None:
        left = size
        while left:
            left -= len(far.recv(min(left, 1 << 20)))
        far.sendall(b"!")

    thread = threading.Thread(target=take)
    thread.start()
    near.sendall(bytes(size))
    assert near.recv(1) == b"!"
    thread.join()


def counted(node: Node) -> tuple[int, int]:
    """Bytes that the node's interface has received and sent."""
    lines = on(node, lambda: Path("/proc/thread-self/net/dev").read_text()).splitlines()
    (found,) = [line.split()[1:] for line in lines if line.split()[0] == f"{node.interface}:"]
    return int(found[0]), int(found[8])


def networks() -> set[str]:
    """Network namespaces that a process is in or holds a descriptor of."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [process / "ns/net", *(process / "fd").iterdir()]
        except OSError:
            continue
        for link in links:
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if re.fullmatch(r"net:\[\d+\]", target):
                found.add(target)
    return found


def marked(name: str, value: str) -> list[psutil.Process]:
    """Processes with this variable in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def emulating(program: Callable[[], Sequence[str]], folder: Path) -> Iterator[Start]:
    """Starts a program, `expertmesh emulate` as a rule, with further words; afterwards nothing of it may be left.
    Modules in the folder are found first."""
    value, temporary = os.urandom(8).hex(), folder / "temporary"
    temporary.mkdir()
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = os.environ | {MARK: value, "PYTHONPATH": path, "TMPDIR": str(temporary)}
    before, interfaces, shared = networks(), psutil.net_if_addrs(), set(os.listdir("/dev/shm"))
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
        usual = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"preexec_fn": _usual_signals}
        started.append(
            subprocess.Popen([*program(), *arguments], text=True, env=environment, **(usual | options))
        )
        return started[-1]

    yield call
    for process in started:
        with process:
            process.kill()

    def left() -> list[object]:
        return [*marked(MARK, value), *networks() - before, *set(os.listdir("/dev/shm")) - shared]

    end = time.monotonic() + LIMIT
    while left() and time.monotonic() < end:
        time.sleep(0.02)
    assert left() == list(temporary.iterdir()) == [] and psutil.net_if_addrs() == interfaces


def _usual_signals() -> None:
    """Whatever these tests are started from."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Said:
    """Lines of a stream as they come, read by a thread, so that nobody waits for who reads them."""

    def __init__(self, stream: Any) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(stream,))
        self._thread.start()

    def wait_for(self, text: str) -> None:
        """Until a line has this in it. AssertionError where none ever has."""
        with self._news:
            self._news.wait_for(lambda: self._has(text) or not self._thread.is_alive(), LIMIT)
        assert self._has(text), "\n".join(self.lines)

    def all(self) -> list[str]:
        self._thread.join(LIMIT)
        return self.lines

    def _has(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def _read(self, stream: Any) -> None:
        for line in stream:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
