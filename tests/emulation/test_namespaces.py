"""Emulated clusters: machines that reach each other over links of a given rate and delay, and nothing else."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from expertmesh.emulation import cluster as emulated
from expertmesh.emulation import switch
from expertmesh.emulation.bridge import can_delay
from expertmesh.emulation.cluster import EmulatedCluster, Node
from expertmesh.errors import InputError
from tests.support.emulation import (
    LIMIT,
    connection,
    counted,
    needs_a_cluster,
    networks,
    on,
    transfer,
    why_not,
)

SHORT = 0.0005  # seconds
# By the kernel alone, and with whatever it takes to delay.
both_kinds = pytest.mark.parametrize("delay", [0.0, SHORT], ids=["direct", "delayed"])
RATE = 20_000_000  # bits/s
SIZE = 400_000  # bytes, which take 0.16 s at this rate
ENTER = """
import json, os, socket, sys
import psutil
from expertmesh.emulation.namespaces import enter
enter(*sys.argv[1:])
addresses = {name: found[0].address for name, found in psutil.net_if_addrs().items()}
print(json.dumps([socket.gethostname(), addresses]))
"""
PR_CAPBSET_DROP = 24

pytestmark = needs_a_cluster


@pytest.fixture
def cluster() -> Iterator[Callable[..., tuple[Node, ...]]]:
    """Makes a cluster; returns its nodes."""
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(EmulatedCluster(*args)).nodes


def round_trip(near: socket.socket, far: socket.socket) -> float:
    start = time.monotonic()
    near.sendall(b"?")
    far.sendall(far.recv(1))
    assert near.recv(1) == b"?"
    return time.monotonic() - start


@both_kinds
def test_nodes_reach_each_other(cluster: Callable[..., tuple[Node, ...]], delay: float) -> None:
    nodes = cluster(3, 0, delay)
    assert [(n.number, n.host, n.address, n.interface) for n in nodes] == [
        (0, "node0", "10.77.0.1", "eth0"), (1, "node1", "10.77.0.2", "eth0"), (2, "node2", "10.77.0.3", "eth0"),
    ]  # fmt: skip
    for client in nodes:
        for server in nodes:
            with connection(client, server) as (near, far):
                transfer(near, far, 100_000)
                assert near.getpeername()[0] == server.address and far.getpeername()[0] == client.address


@both_kinds
def test_nodes_reach_nothing_else(cluster: Callable[..., tuple[Node, ...]], delay: float) -> None:
    before = psutil.net_if_addrs()
    node, _ = cluster(2, 0, delay)
    assert psutil.net_if_addrs() == before
    assert set(on(node, psutil.net_if_addrs)) == {"lo", "eth0"}
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ConnectionRefusedError):
        on(node, lambda: socket.create_connection(listener.getsockname(), LIMIT))
    with pytest.raises(OSError, match="unreachable"):
        on(node, lambda: socket.create_connection(("192.0.2.1", 80), LIMIT))
    routes = on(node, lambda: Path("/proc/thread-self/net/route").read_text().splitlines()[1:])
    assert [line.split()[:2] for line in routes] == [["eth0", "00004D0A"]]


def test_a_process_enters(cluster: Callable[..., tuple[Node, ...]]) -> None:
    _, node = cluster(2)
    here = socket.gethostname()
    command = [sys.executable, "-c", ENTER, node.namespace, node.host]
    host, addresses = json.loads(subprocess.check_output(command, timeout=LIMIT))
    assert (host, addresses) == ("node1", {"lo": "127.0.0.1", "eth0": "10.77.0.2"})
    assert socket.gethostname() == here
    done = subprocess.run([*command[:-2], "/proc/0/fd/0", "x"], capture_output=True, check=False)
    assert done.returncode == 1 and b"FileNotFoundError" in done.stderr


@both_kinds
def test_bytes_are_counted_at_both_ends(cluster: Callable[..., tuple[Node, ...]], delay: float) -> None:
    """And nothing but them: nothing is sent by itself."""
    one, two, three = cluster(3, RATE, delay)
    time.sleep(0.1)
    assert counted(one) == counted(two) == (0, 0)
    with connection(one, two) as (near, far):
        transfer(near, far, SIZE)
    end = time.monotonic() + LIMIT
    while counted(one) != counted(two)[::-1] and time.monotonic() < end:
        time.sleep(0.05)  # the last packets of the connection are under way
    received, sent = counted(one)
    assert counted(two) == (sent, received)
    assert SIZE < sent < 1.03 * SIZE and received < 0.03 * SIZE
    assert counted(three) == (0, 0)


@both_kinds
def test_the_rate_holds_for_each_link_and_direction(
    cluster: Callable[..., tuple[Node, ...]], delay: float
) -> None:
    """Two that send to one share what it receives, two to whom one sends what it sends; apart, each has its own."""
    nodes = cluster(4, RATE, delay)

    def seconds(*pairs: tuple[int, int]) -> float:
        with ExitStack() as stack:
            ends = [stack.enter_context(connection(nodes[a], nodes[b])) for a, b in pairs]
            threads = [threading.Thread(target=transfer, args=(*pair, SIZE)) for pair in ends]
            start = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            return time.monotonic() - start

    def holds(times: float, *pairs: tuple[int, int]) -> bool:
        """Never faster than this many times SIZE at RATE; about as fast once, where the machine is not too busy."""
        for _ in range(20):
            taken = seconds(*pairs) * RATE / (SIZE * 8) / times
            assert taken > 0.92
            if taken < 1.5:
                return True
        return False

    assert holds(1, (0, 1)) and holds(1, (0, 1), (2, 3)) and holds(1, (0, 1), (1, 0))
    assert holds(2, (0, 2), (1, 2)) and holds(2, (0, 1), (0, 2))


def test_the_delay(cluster: Callable[..., tuple[Node, ...]]) -> None:
    delay = 0.01
    with connection(*cluster(2, 0, delay)) as ends:
        trips = [round_trip(*ends) for _ in range(10)]
    assert 2 * delay < min(trips)


@both_kinds
def test_a_cut_is_silent(delay: float) -> None:
    with EmulatedCluster(3, RATE, delay) as cluster:
        zero, one, two = cluster.nodes
        with connection(zero, one) as (near, far), connection(zero, two) as others:
            for ends in ((near, far), others):
                round_trip(*ends)
            cluster.cut(1)
            before = counted(one)[0]
            assert on(one, psutil.net_if_stats)["eth0"].isup
            for end in (near, far):
                end.sendall(bytes(100_000))
                end.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    end.recv(1)
            transfer(*others, 100_000)
            transfer(*others[::-1], 100_000)
            assert counted(one)[0] == before and "RUNNING" in on(one, partial(flags, "eth0"))
        assert counted(two)[0] < 250_000


def flags(interface: str) -> str:
    return subprocess.check_output(["ip", "link", "show", interface], text=True).replace(
        "LOWER_UP", "RUNNING"
    )


@both_kinds
def test_nothing_is_left(delay: float) -> None:
    opened, before = set(os.listdir("/proc/self/fd")), networks()
    children = {child.pid for child in psutil.Process().children()}
    cluster = EmulatedCluster(3, RATE, delay)
    assert len(networks() - before) >= 3
    assert len(psutil.Process().children()) - len(children) == (cluster.switch is not None)
    path = cluster.nodes[0].namespace
    cluster.close()
    cluster.close()
    assert set(os.listdir("/proc/self/fd")) == opened and not networks() - before
    assert {child.pid for child in psutil.Process().children()} == children
    assert not Path(path).exists()


@both_kinds
def test_its_end_without_a_close(delay: float) -> None:
    """A process that is killed leaves no switch and no namespace."""
    before = networks()
    program = (
        "import sys, time\nfrom expertmesh.emulation.cluster import EmulatedCluster\n"
        f"cluster = EmulatedCluster(2, 0, {delay})\nprint(cluster.switch or 0, flush=True)\ntime.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        switch_process = int(process.stdout.readline())
        assert networks() > before
        process.kill()

    def left() -> bool:
        return bool(networks() - before) or (switch_process > 0 and psutil.pid_exists(switch_process))

    end = time.monotonic() + LIMIT
    while left() and time.monotonic() < end:
        time.sleep(0.02)
    assert not left()


def test_as_many_as_there_may_be() -> None:
    with (
        EmulatedCluster(emulated.LARGEST) as cluster,
        connection(cluster.nodes[0], cluster.nodes[-1]) as ends,
    ):
        round_trip(*ends)


@pytest.mark.parametrize("nodes", [0, -1, emulated.LARGEST + 1])
def test_a_number_of_nodes_that_cannot_be(nodes: int) -> None:
    with pytest.raises(InputError, match=f"nodes is {nodes}, but must be from 1 to"):
        EmulatedCluster(nodes)


def test_programs_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else name)
    with pytest.raises(InputError, match="takes the program tc: install iproute2"):
        EmulatedCluster(2)


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="on Linux only, and this is darwin"):
        EmulatedCluster(2)


@pytest.mark.parametrize(
    ("lost", "names"), [((12,), "CAP_NET_ADMIN"), ((12, 21), "CAP_NET_ADMIN and CAP_SYS_ADMIN")]
)
def test_what_is_not_allowed(lost: tuple[int, ...], names: str) -> None:
    def lose() -> None:
        for capability in lost:
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability)

    program = "from expertmesh.emulation.cluster import EmulatedCluster\nEmulatedCluster(2)"
    done = subprocess.run(
        [sys.executable, "-c", program], preexec_fn=lose, capture_output=True, text=True, check=False
    )
    assert f"InputError: to emulate a cluster takes {names}: run it as root" in done.stderr


@pytest.mark.skipif(why_not() is None and can_delay(), reason="the kernel has netem: nothing else is needed")
def test_a_delay_that_nothing_can_make(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(switch, "TUN", "/dev/net/none")
    with pytest.raises(
        InputError, match="a delay takes netem in the kernel or /dev/net/none, and neither is there"
    ):
        EmulatedCluster(2, 0, 0.001)
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(
        "expertmesh.emulation.cluster.shaped", lambda *_: "qdisc add dev eth0 root no_such_queue"
    )
    with pytest.raises(InputError, match=r"tc could not set up the emulated network: .*kind is unknown"):
        EmulatedCluster(2, RATE)
    assert set(os.listdir("/proc/self/fd")) == before
