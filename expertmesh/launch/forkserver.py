"""Processes in milliseconds: forked from one that has imported torch already.

The process that forks never computes. A process in which an OpenMP operation has run in several threads hands its
children a pool whose threads do not exist, and they wait for these for ever; importing torch starts none.

Three generations: the driver (whoever makes a ForkServer), its server, and the server's children, which run programs.
Each ends with the one before it, even when that is killed: the server by the end of its channel, the children by
PR_SET_PDEATHSIG, which is about the thread that forked, and the server has only that one.
"""

import contextlib
import ctypes
import gc
import importlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from expertmesh.errors import InputError, RankFailure
from expertmesh.launch.channel import Channel, ChannelClosed
from expertmesh.launch.descriptors import allow_files

# The driver's search path comes as arguments and is in force before anything is imported. `-m` would search the working
# directory first, and would run a second copy of this module.
BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from expertmesh.launch.forkserver import serve; serve(int(sys.argv[1]))"
)
GRACE = 10.0  # seconds that the server has to end its children and itself
PR_SET_PDEATHSIG = 1
RESTORED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


class Process:
    """A process that the fork server started: its pid and the driver's end of its channel."""

    def __init__(self, link: "_Link", pid: int, channel: Channel) -> None:
        self.pid, self.channel = pid, channel
        self.status: int | None = None  # set by the link
        self._link = link

    def poll(self) -> int | None:
        """None while it runs, then its exit status, or -N after signal N. What the server did not live to report
        counts as killed."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> int | None:
        """As poll, after at most so many seconds; None waits until it has ended."""
        self._link.wait_until(lambda: self.status is not None, timeout)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing where it has ended. Does not wait. ValueError: there is no such signal."""
        checked = int(signal.Signals(number))
        if self.status is None:
            # The server does it: only who reaps a process knows that its pid is not somebody else's by now.
            with contextlib.suppress(ChannelClosed):
                self._link.channel.send({"kill": self.pid, "signal": checked})


class ForkServer:
    """Starts processes that have torch and other modules imported already.

    Environment, module search path, working directory, standard output and standard error are the driver's when this
    is made; standard input is empty, and there is no terminal: Ctrl-C reaches the driver alone. What the imports have
    drawn at random is the same in all processes: torch's default generator has one state until it is seeded.

    Several threads may use a server at once.
    """

    def __init__(self, preload: Sequence[str] = ("torch", "numpy")) -> None:
        """RankFailure where the system has no room for one more process; InputError: see `allow_files`."""
        allow_files(0)
        near, far = socket.socketpair()
        link = _Link(Channel(near))
        command = [sys.executable, "-c", BOOT, str(far.fileno()), *sys.path]
        try:
            with far:
                self._server = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[far.fileno()], start_new_session=True
                )
            # Nobody waits for the imports here: `start` does.
            with contextlib.suppress(ChannelClosed):
                link.channel.send({"preload": list(preload)})
        except BaseException as error:
            link.channel.close()
            if isinstance(error, OSError):
                raise RankFailure(f"the fork server cannot be started: {error}") from None
            raise
        self.pid = self._server.pid
        self._link = link

    def start(
        self, program: str, specs: Sequence[dict[Any, Any]], environment: Mapping[str, str] | None = None
    ) -> list[Process]:
        """One process for each spec, in this order, that imports "package.module:function" and calls
        function(spec, channel). It exits with 0 when that returns and with 1 after an exception.

        The environment is set before the program is imported, but after what was preloaded: what that read at its
        import (OMP_NUM_THREADS in OpenMP) it does not read again.

        ValueError, TypeError: the program's name or a spec is not of that form. RankFailure: the server could not
        start, has died or is closed, or the machine has no room for so many processes; InputError: so many files may
        not be open. Then none of them runs.
        """
        module, _, function = program.partition(":")
        if not (module and function):
            raise ValueError(f"program {program!r} is not of the form package.module:function")
        request = {"module": module, "function": function, "environment": dict(environment or {})}
        allow_files(2 * len(specs))
        try:
            with contextlib.ExitStack() as unless_started, contextlib.ExitStack() as ours:
                near, far = [], []
                for _ in specs:
                    pair = socket.socketpair()
                    near.append(unless_started.enter_context(contextlib.closing(Channel(pair[0]))))
                    far.append(ours.enter_context(pair[1]).fileno())
                answer = self._link.start(request | {"specs": list(specs)}, near, far)
                if isinstance(answer, list):
                    unless_started.pop_all()
                    return answer
        except OSError as error:  # of the system
            answer = str(error)
        if answer is None:
            answer = self._link.problem or f"it ended with status {self._server.wait(GRACE)}"
        raise RankFailure(f"the fork server started no processes: {answer}")

    def close(self) -> None:
        """Kill what still runs, end the server and wait for both; close all channels. Again: nothing."""
        self._link.problem = self._link.problem or "it is closed"
        if self._link.idle:
            self._server.kill()  # it may be importing, which nobody needs any more
        with contextlib.suppress(ChannelClosed):
            self._link.channel.send({"end": True})
        self._link.wait_until(lambda: False, GRACE)
        if not self._link.closed:
            self._server.kill()
        self._server.wait()
        self._link.wait_until(lambda: False, GRACE)
        self._link.close()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Link:
    """The driver's side of the server's channel.

    What the server says is entered by whoever waits for something: one thread reads, and wakes the others when there
    is news. So reports arrive in the order in which they were sent, and nothing needs a thread of its own.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.closed = False
        self.problem: str | None = None  # why there is no server
        self._news = threading.Condition()
        self._reading = False
        self._keys = itertools.count()
        self._asked: dict[int, list[Channel]] = {}
        self._answers: dict[int, list[Process] | str] = {}
        self._running: dict[int, Process] = {}
        self._processes: list[Process] = []  # with open channels

    @property
    def idle(self) -> bool:
        return not self._asked and not self._running

    def start(
        self, request: dict[str, Any], near: list[Channel], far: list[int]
    ) -> list[Process] | str | None:
        """The processes, or why there are none; None where there is no server to say it."""
        # Reports are read first: the server must not wait for us to read while we wait for it.
        self.wait_until(lambda: False, 0.0)
        key = next(self._keys)
        self._asked[key] = near
        try:
            self.channel.send(request | {"key": key}, far)
        except ChannelClosed:
            pass  # seen below
        except (TypeError, ValueError, OverflowError):  # nothing was sent
            del self._asked[key]
            raise
        self.wait_until(lambda: key in self._answers)
        return self._answers.pop(key, None)

    def wait_until(self, done: Callable[[], bool], timeout: float | None = None) -> None:
        """Enter what the server says until done(), the time is over or the server is gone."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._news:
                if self.closed or done():
                    return
                left = None if end is None else max(0.0, end - time.monotonic())
                if self._reading:
                    if not self._news.wait(left):
                        return
                    continue
                self._reading = True
            message: dict[str, Any] = {}
            try:
                message = self._receive(left)
            finally:
                with self._news:
                    self._reading = False
                    self._enter(message)
                    self._news.notify_all()
            if not message:
                return

    def close(self) -> None:
        with self._news:
            self._enter({"closed": True})
            self._news.notify_all()
            self.channel.close()
            for process in self._processes:
                process.channel.close()

    def _receive(self, timeout: float | None) -> dict[str, Any]:
        poller = select.poll()
        poller.register(self.channel, select.POLLIN)
        if not poller.poll(None if timeout is None else 1000 * timeout):
            return {}
        try:
            message: dict[str, Any] = self.channel.receive()
        except ChannelClosed:
            return {"closed": True}
        return message

    def _enter(self, message: dict[str, Any]) -> None:
        if "status" in message:
            self._running.pop(message["pid"]).status = message["status"]
        elif "pids" in message:
            channels = self._asked.pop(message["key"])
            started = [Process(self, *each) for each in zip(message["pids"], channels, strict=True)]
            self._running |= {process.pid: process for process in started}
            self._processes = [p for p in self._processes if p.channel.fileno() >= 0] + started
            self._answers[message["key"]] = started
        elif "refused" in message:
            self._asked.pop(message["key"])
            self._answers[message["key"]] = message["refused"]
        elif "problem" in message:
            self.problem = message["problem"]
        elif "closed" in message:
            self.closed = True
            while self._running:
                self._running.popitem()[1].status = -signal.SIGKILL


def serve(descriptor: int) -> None:
    """The server, until its channel ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited "ignore" would reap before us
    server = _Server(Channel(socket.socket(fileno=descriptor)))
    with contextlib.suppress(ChannelClosed):
        try:
            server.run()
        finally:
            server.end()


class _Server:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._children: dict[int, int] = {}  # those not reaped: pid -> pidfd, readable when it has ended
        self._libc = ctypes.CDLL(None)
        self._pid = os.getpid()

    def run(self) -> None:
        try:
            for name in self._channel.receive()["preload"]:
                importlib.import_module(name)
        except Exception as error:
            self._channel.send({"problem": f"{type(error).__name__}: {error}"})
            raise
        gc.collect()
        gc.freeze()  # a collection in a child would write into, and so copy, the pages that all of them share
        while True:
            poller = select.poll()
            for descriptor in (self._channel.fileno(), *self._children.values()):
                poller.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poller.poll()}
            for pid, descriptor in list(self._children.items()):
                if descriptor in ready:
                    self._reap(pid)
            if self._channel.fileno() in ready and not self._obey(self._channel.receive()):
                return

    def end(self) -> None:
        """Kill and reap all children."""
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        while self._children:
            self._reap(next(iter(self._children)))

    def _obey(self, request: dict[str, Any]) -> bool:
        """False: there is nothing more to do."""
        if "specs" in request:
            self._start(request)
        elif request.get("kill") in self._children:
            os.kill(request["kill"], request["signal"])
        return "end" not in request

    def _reap(self, pid: int, report: bool = True) -> None:
        os.close(self._children.pop(pid))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if report:
            self._channel.send({"pid": pid, "status": status})

    def _start(self, request: dict[str, Any]) -> None:
        pids: list[int] = []
        ends: list[int] = []
        with contextlib.suppress(InputError):  # said when they do not come
            allow_files(2 * len(request["specs"]))
        try:
            ends = self._channel.receive_descriptors(len(request["specs"]))
            for number in range(len(ends)):
                pids.append(self._fork(request, ends, number))
        except ChannelClosed:
            raise
        except OSError as error:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                self._reap(pid, report=False)
            self._channel.send({"key": request["key"], "refused": str(error)})
        else:
            self._channel.send({"key": request["key"], "pids": pids})
        finally:
            for end in ends:
                os.close(end)

    def _fork(self, request: dict[str, Any], ends: list[int], number: int) -> int:
        pid = os.fork()
        if pid == 0:
            self._become_child(request, ends, number)
        try:
            self._children[pid] = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        return pid

    def _become_child(self, request: dict[str, Any], ends: list[int], number: int) -> NoReturn:
        status = 1
        try:
            self._leave_the_server(ends, number)
            os.environ.update(request["environment"])
            function = getattr(importlib.import_module(request["module"]), request["function"])
            function(request["specs"][number], Channel(socket.socket(fileno=ends[number])))
            status = 0
        except SystemExit as error:
            status = _status(error.code)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(status & 0xFF)

    def _leave_the_server(self, ends: list[int], number: int) -> None:
        """Die with the server, hold none of its descriptors, and handle signals as any process does."""
        failed = self._libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if failed or os.getppid() != self._pid:
            raise RuntimeError("the fork server died while it started this process")
        for descriptor in (*ends[:number], *ends[number + 1 :], *self._children.values()):
            os.close(descriptor)
        os.close(self._channel.detach())
        self._children.clear()
        for restored in RESTORED:
            signal.signal(restored, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _status(code: object) -> int:
    """What sys.exit(code) means."""
    if isinstance(code, int):
        return code
    if code is not None:
        print(code, file=sys.stderr)
    return int(code is not None)
