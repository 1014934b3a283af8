"""The process that keeps an emulated cluster: it holds the namespaces and is the parent of the programs in them.

It is apart from the process that asked for it (its session and process group are its own) and outlives it by as long
as it takes to kill what that has left behind. Both are subreapers: a process whose parent has ended becomes a child
of the keeper, and of the front process when the keeper has ended too, so that each finds all that is left.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import psutil

from expertmesh.emulation.cluster import EmulatedCluster, Node
from expertmesh.emulation.namespaces import enter
from expertmesh.errors import InputError
from expertmesh.launch.channel import Channel, ChannelClosed

BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from expertmesh.emulation.keeper import serve; serve(int(sys.argv[1]))"
)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 1, 36, 37
LIMIT = 10.0  # seconds that killed processes have to end
PAUSE = 0.005  # seconds between two looks


def become_subreaper(on: bool = True) -> bool:
    """Descendants of this process whose parents end become its children. Returns what was before."""
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(on))
    return bool(before.value)


def end_descendants(which: Callable[[int], bool], reap: Callable[[list[int]], object]) -> bool:
    """Kill those children of this process, a subreaper, that `which` is true of, until there is none: descendants
    become children. `reap` waits for those that have ended. False: some do not end."""
    end = time.monotonic() + LIMIT
    while pids := [child.pid for child in psutil.Process().children() if which(child.pid)]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # a child's pid is its own until it is waited for
        reap(pids)
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE)
    return True


def serve(descriptor: int) -> None:
    """The process, until its channel or all programs have ended."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # programs inherit what is ignored
    become_subreaper()
    keeper = _Keeper(Channel(socket.socket(fileno=descriptor)))
    with contextlib.suppress(ChannelClosed):
        keeper.run()


class _Keeper:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pid = os.getpid()
        # pid -> number of the program, where it runs, its process
        self._running: dict[int, tuple[int, Node, subprocess.Popen[bytes]]] = {}
        self._killed: set[int] = set()  # numbers of programs
        self._left: list[Node] = []  # by their programs, which may have left processes behind
        self._agenda: list[tuple[float, str, int]] = []  # (when, what, number of a node or program)
        self._problem: str | None = None
        self._news, bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(bell)

    def run(self) -> None:
        """ChannelClosed: the front process has ended or has had enough."""
        request = self._channel.receive()
        try:
            self._cluster = EmulatedCluster(request["nodes"], request["rate"], request["delay"])
        except InputError as error:
            self._channel.send({"refused": str(error)})
            return
        with self._cluster:
            try:
                self._channel.send({"nodes": [asdict(node) for node in self._cluster.nodes]})
                plan = self._channel.receive()
                if self._start_all(plan, self._channel.receive_descriptors(plan["outputs"])):
                    self._attend()
            finally:
                ended = end_descendants(lambda _: True, lambda _: _reap())
        problem = self._problem or (None if ended else "processes in the emulated cluster do not end")
        self._channel.send({"failed": problem} if problem else {"done": True})

    def _start_all(self, plan: dict[str, Any], outputs: list[int]) -> bool:
        """Two outputs for each program, or none, for this process's own, which are the front's."""
        number = 0
        try:
            for number, program in enumerate(plan["programs"]):
                self._start(number, program, outputs[2 * number : 2 * number + 2])
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._channel.send({"refused": f"{plan['programs'][number]['words'][0]}: {error}"})
            return False
        finally:
            for output in outputs:
                os.close(output)
        now = time.monotonic()
        self._agenda = sorted((now + seconds, what, number) for what, number, seconds in plan["agenda"])
        return True

    def _start(self, number: int, program: dict[str, Any], outputs: list[int]) -> None:
        node = self._cluster.nodes[program["node"]]
        out, err = outputs or (None, None)

        def before() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
            if os.getppid() != self._pid:
                raise RuntimeError("the keeper has ended")
            enter(node.namespace, node.host)

        started = subprocess.Popen(
            program["words"], env=os.environ | program["environment"], stdout=out, stderr=err,
            start_new_session=True, preexec_fn=before,
        )  # fmt: skip
        self._running[started.pid] = (number, node, started)

    def _attend(self) -> None:
        """Until all programs have ended."""
        while self._running and not self._problem:
            self._wait()
            self._enter_ends()
            while self._left:
                inode = os.stat(self._left.pop().namespace).st_ino
                end_descendants(partial(_is_in, inode), lambda _: self._enter_ends())
            while self._agenda and self._agenda[0][0] <= time.monotonic():
                self._do(*self._agenda.pop(0)[1:])

    def _wait(self) -> None:
        """For the front process, the end of a child, or the next thing to do."""
        left = max(0.0, self._agenda[0][0] - time.monotonic()) if self._agenda else None
        inputs: list[Channel | int] = [self._channel, self._news]
        ready, _, _ = select.select(inputs, (), (), left)
        if self._news in ready:
            os.read(self._news, 4096)
        if self._channel in ready:
            number = self._channel.receive()["signal"]
            for pid in self._running:
                os.killpg(pid, number)

    def _do(self, what: str, number: int) -> None:
        if what == "cut":
            self._cluster.cut(number)
            self._channel.send({"cut": number})
            return
        for pid, (other, _, _) in self._running.items():
            if other == number:
                self._killed.add(number)
                os.kill(pid, signal.SIGKILL)

    def _enter_ends(self) -> None:
        for pid, status in _reap().items():
            if pid == self._cluster.switch:
                self._problem = "the switch of the emulated cluster has died"
            if pid in self._running:
                number, node, process = self._running.pop(pid)
                process.returncode = status
                killed = number in self._killed and status == -signal.SIGKILL
                self._channel.send({"ended": number, "status": status, "killed": killed})
                self._left.append(node)


def _reap() -> dict[int, int]:
    """pid -> exit status, or -N after signal N, of all children that have ended."""
    found = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return found


def _is_in(namespace: int, pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == namespace
    except OSError:  # it has ended
        return False
