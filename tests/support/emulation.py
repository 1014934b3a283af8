"""For tests of emulated clusters: whether there can be one here, sockets on its nodes, and what is left of it."""

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from expertmesh.emulation.cluster import Node, require
from expertmesh.emulation.namespaces import inside
from expertmesh.errors import InputError

T = TypeVar("T")
LIMIT = 60.0  # seconds after which something hangs


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
