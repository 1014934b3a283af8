"""The network of an emulated cluster as a process: a switch that holds each frame for the time of its delay.

For kernels whose queues cannot delay. Frames come from TAP devices, one in each namespace, and go to others by their
destination's address; addresses are known from the beginning, and there is no broadcast.

Measured on one core with frames of 9000 bytes: 12 microseconds a frame; 9 Gbit/s from one machine to another, 5.5
in all where eight send to each other and compete with it for processors. A frame comes 0.05 ms later than it should.
"""

import contextlib
import ctypes
import fcntl
import gc
import heapq
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from expertmesh.emulation.links import MTU, burst
from expertmesh.emulation.namespaces import configure, inside
from expertmesh.errors import InputError
from expertmesh.launch.channel import Channel, ChannelClosed

BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from expertmesh.emulation.switch import serve; serve(int(sys.argv[1]))"
)
TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME = MTU + 64  # bytes; the header of a frame is shorter than the difference
ADDRESS = 6  # bytes; a frame begins with its destination's
WAITING = 100_000  # frames that a TAP device holds; it drops what comes then
TURN = 32  # frames that are taken from one port before others have their turn
GRACE = 5.0  # seconds that the process has to end
PR_SET_TIMERSLACK = 29


class Switch:
    """Gives each namespace an `eth0`, a TAP device, and starts the process that forwards between them.

    What goes to a machine keeps to the rate (bits/s, 0 for none); what comes from it its own end has to slow down.
    """

    def __init__(
        self, namespaces: Sequence[int], addresses: Sequence[str], rate: int = 0, delay: float = 0.0
    ) -> None:
        if not Path(TUN).exists():
            raise InputError(
                f"a delay takes netem in the kernel or {TUN}, and neither is there: leave it out"
            )
        near, far = socket.socketpair()
        self._channel = Channel(near)
        with far, contextlib.ExitStack() as ours, contextlib.ExitStack() as unless_made:
            unless_made.callback(self._channel.close)
            taps = []
            for namespace, address in zip(namespaces, addresses, strict=True):
                taps.append(inside(namespace, partial(_open_tap, address)))
                ours.callback(os.close, taps[-1])
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(far.fileno()), *sys.path],
                stdin=subprocess.DEVNULL, pass_fds=[far.fileno()], start_new_session=True,
            )  # fmt: skip
            with contextlib.suppress(ChannelClosed):  # it died at once; then nobody reaches anybody
                self._channel.send({"addresses": list(addresses), "rate": rate, "delay": delay}, taps)
            unless_made.pop_all()
        self.pid = self._process.pid

    def cut(self, number: int) -> None:
        """Drop what a machine sends and what is on its way to it. Its link stays up."""
        with contextlib.suppress(ChannelClosed):  # all are cut off then
            self._channel.send({"cut": number})

    def close(self) -> None:
        self._channel.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(descriptor: int) -> None:
    """The process, until its channel ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # there is nothing to collect, and looking for it takes time
    ctypes.CDLL(None).prctl(
        PR_SET_TIMERSLACK, ctypes.c_ulong(1)
    )  # wake up after so many nanoseconds, not 50,000
    with contextlib.suppress(OSError):
        os.nice(-20)  # in a real cluster, switches do not compete with programs
    channel = Channel(socket.socket(fileno=descriptor))
    with contextlib.suppress(ChannelClosed):
        request = channel.receive()
        taps = channel.receive_descriptors(len(request["addresses"]))
        _Forwarder(taps, request["addresses"], request["rate"], request["delay"]).run(channel)


class _Forwarder:
    """Takes frames in, and puts each out when its time has come."""

    def __init__(self, taps: Sequence[int], addresses: Sequence[str], rate: int, delay: float) -> None:
        self._taps, self._delay = list(taps), delay
        self._ports = {bytes.fromhex(a.replace(":", "")): tap for a, tap in zip(addresses, taps, strict=True)}
        # The same token bucket as the kernel's: a frame leaves when all before it have been sent at this rate, less
        # what may pass at once.
        self._seconds_per_byte = 8 / rate if rate else 0.0
        self._ahead = burst(rate) * self._seconds_per_byte if rate else 0.0
        self._sent = dict.fromkeys(taps, 0.0)  # when all frames so far have been sent
        self._held: list[tuple[float, int, int, bytes]] = []  # (due, order of coming, to, frame)
        self._order = itertools.count()
        self._cut: set[int] = set()
        for tap in taps:
            os.set_blocking(tap, False)

    def run(self, channel: Channel) -> None:
        """ChannelClosed at the end."""
        inputs: list[Channel | int] = [channel, *self._taps]
        while True:
            # Not epoll: in Python that counts in milliseconds.
            ready, _, _ = select.select(inputs, (), (), self._deliver())
            for source in ready:
                if isinstance(source, int):
                    self._take(source)
                else:
                    self._cut.add(self._taps[channel.receive()["cut"]])

    def _take(self, source: int) -> None:
        ports, cut, held, delay = self._ports, self._cut, self._held, self._delay
        for _ in range(TURN):
            try:
                frame = os.read(source, FRAME)
            except OSError:  # no more of them
                return
            to = ports.get(frame[:ADDRESS])
            if to is None or source in cut:
                continue
            due = time.monotonic() + delay
            if self._seconds_per_byte:
                self._sent[to] = max(due, self._sent[to]) + len(frame) * self._seconds_per_byte
                due = max(due, self._sent[to] - self._ahead)
            heapq.heappush(held, (due, next(self._order), to, frame))

    def _deliver(self) -> float | None:
        """Put out what is due. Seconds until there is more; None: nothing is held."""
        held, cut = self._held, self._cut
        while held:
            left = held[0][0] - time.monotonic()
            if left > 0:
                return left
            _, _, to, frame = heapq.heappop(held)
            if to not in cut:
                with contextlib.suppress(OSError):  # the interface is down
                    os.write(to, frame)
        return None


def _open_tap(address: str) -> int:
    """The descriptor of a new TAP device `eth0` in the namespace of this thread; the device lasts as long."""
    tap = os.open(TUN, os.O_RDWR)
    try:
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
        configure("ip", [f"link set eth0 address {address} txqueuelen {WAITING}"])
    except BaseException:
        os.close(tap)
        raise
    return tap
