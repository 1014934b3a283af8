"""Network namespaces without names: they last as long as a process is in one or holds its descriptor.

Nothing has to remove them. The kernel does, with all devices and queues in them, when the last process has ended and
the last descriptor is closed, even where nobody was left to clean up.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from expertmesh.errors import InputError

CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000
# What would spoil byte counts and rates: IPv6 sends on its own account (router solicitations, multicast); a congestion
# control that paces by its own model (bbr) does not fill a shaped link evenly; and where packets wait for long and none
# is lost, TCP sends some again, as probes. Of two settings the later one stays, unless a kernel refuses it outside the
# host's own namespace.
SETTINGS = (
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("ipv4/tcp_congestion_control", "reno"),
    ("ipv4/tcp_congestion_control", "cubic"),
    ("ipv4/tcp_early_retrans", "0"),
)
T = TypeVar("T")


def enter(namespace: str, host: str) -> None:
    """Move this process into the network namespace at a path, under a host name of its own.

    For a process with one thread: only the thread that calls moves. sysfs goes on showing the network of before, procfs
    does not. OSError: the namespace is not there, or this process may not (CAP_SYS_ADMIN).
    """
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        _call("setns", descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)
    _call("unshare", CLONE_NEWUTS)
    socket.sethostname(host)


def create() -> int:
    """The descriptor of a new network namespace with nothing in it but a loopback that is up, and IPv4 only."""
    return _in_a_thread(_create)


def inside(namespace: int, work: Callable[[], T]) -> T:
    """What work() returns in the namespace. Processes and descriptors that it makes belong there too."""

    def moved() -> T:
        _call("setns", namespace, CLONE_NEWNET)
        return work()

    return _in_a_thread(moved)


def configure(tool: str, lines: Iterable[str]) -> None:
    """Let `ip`, `tc` or `bridge` carry out commands in the namespace of this thread. InputError where the kernel
    refuses one; it may lack the kind of device or queue."""
    text = "\n".join(lines)
    done = subprocess.run([tool, "-batch", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{tool} could not set up the emulated network: {' '.join(done.stderr.split())}")


def _create() -> int:
    _call("unshare", CLONE_NEWNET)
    for name, value in SETTINGS:
        with contextlib.suppress(OSError):
            Path("/proc/sys/net", name).write_text(value)
    configure("ip", ["link set lo up"])
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _in_a_thread(work: Callable[[], T]) -> T:
    """The namespace is a property of a thread: this one stays where it is."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()


def _call(name: str, *arguments: int) -> None:
    """A system call that Python does not offer yet."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
