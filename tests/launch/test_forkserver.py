"""The fork server: processes start, compute, talk and end, and whoever is killed takes those below along."""

import gc
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from expertmesh.errors import RankFailure
from expertmesh.launch.channel import ChannelClosed
from expertmesh.launch.forkserver import ForkServer, Process

LIMIT = 120.0  # seconds after which something hangs
ECHO = "tests.launch.programs:echo"
END = "tests.launch.programs:end"
DRIVER = """
import sys, threading
from expertmesh.launch.forkserver import ForkServer
server = ForkServer()
processes = server.start("tests.launch.programs:echo", [{}] * 8)
print(server.pid, *(process.pid for process in processes), flush=True)
threading.Event().wait()
"""
FORTY = """
import resource, sys
from expertmesh.launch.launcher import Here
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
try:
    launcher = Here(["expertmesh.launch.duty"])
    members = launcher.start("tests.launch.programs:echo", [{}] * 40, 60.0)
    for member in members:
        member.channel.send("hello")
    print(sum(member.channel.receive() == [None, "hello"] for member in members))
    launcher.close()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as found:
        yield found


@pytest.fixture
def start(server: ForkServer) -> Iterator[Callable[..., list[Process]]]:
    """ForkServer.start of a server that other tests use too; ends what it has started."""
    started: list[Process] = []

    def call(
        program: str, specs: list[dict[Any, Any]], environment: Mapping[str, str] | None = None
    ) -> list[Process]:
        started.extend(new := server.start(program, specs, environment))
        return new

    yield call
    for process in started:
        process.channel.close()
        process.kill()
    assert None not in [process.wait(LIMIT) for process in started]


def receive(process: Process) -> Any:
    poller = select.poll()
    poller.register(process.channel, select.POLLIN)
    assert poller.poll(1000 * LIMIT), f"process {process.pid} says nothing"
    return process.channel.receive()


def ask(process: Process, message: object) -> Any:
    process.channel.send(message)
    return receive(process)


def alive(pid: int) -> bool:
    """It runs. One that waits for init to reap it does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_of(pids: list[int]) -> bool:
    end = time.monotonic() + LIMIT
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def children() -> set[int]:
    """Also those that have ended and were not waited for."""
    return {child.pid for child in psutil.Process().children()}


def test_64_processes_answer(start: Callable[..., list[Process]]) -> None:
    processes = start(ECHO, [{"name": rank, 1: [b"\0"]} for rank in range(64)])
    assert len({process.pid for process in processes}) == 64
    for process in processes:
        process.channel.send("hello")
    assert [receive(process) for process in processes] == [[rank, "hello"] for rank in range(64)]
    assert {process.poll() for process in processes} == {None}
    for process in processes:
        process.channel.close()
    assert {process.wait(LIMIT) for process in processes} == {0}
    assert {process.poll() for process in processes} == {0}


def test_no_processes(start: Callable[..., list[Process]]) -> None:
    assert start(ECHO, []) == []


@pytest.mark.parametrize(
    ("program", "spec", "status"),
    [
        (END, {}, 0),
        (END, {"raise": "broken"}, 1),
        (END, {"exit": None}, 0),
        (END, {"exit": 3}, 3),
        (END, {"exit": "a reason"}, 1),
        (END, {"signal": signal.SIGTERM}, -signal.SIGTERM),
        (END, {"signal": signal.SIGINT}, 1),
        ("tests.launch.no_such_module:end", {}, 1),
        ("tests.launch.programs:no_such_function", {}, 1),
    ],
)
def test_exit_status(
    start: Callable[..., list[Process]], program: str, spec: dict[str, Any], status: int
) -> None:
    (process,) = start(program, [spec])
    assert process.wait(LIMIT) == status
    with pytest.raises(ChannelClosed):
        process.channel.receive()


def test_what_processes_print(capfd: pytest.CaptureFixture[str]) -> None:
    with ForkServer() as server:
        specs = [{}, {"raise": "broken on purpose"}, {"exit": "a reason"}]
        assert [process.wait(LIMIT) for process in server.start(END, specs)] == [0, 1, 1]
    out, err = capfd.readouterr()
    assert out == "on the way"
    assert "Traceback" in err and "RuntimeError: broken on purpose" in err and "a reason\n" in err


def test_one_is_killed_and_the_others_live_on(start: Callable[..., list[Process]]) -> None:
    """Its channel ends at once: nobody else holds it."""
    processes = start(ECHO, [{"name": rank} for rank in range(8)])
    assert ask(processes[3], 1) == [3, 1]
    os.kill(processes[3].pid, signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        receive(processes[3])
    assert processes[3].wait(LIMIT) == -signal.SIGKILL
    del processes[3]
    assert [ask(process, "still")[0] for process in processes] == [0, 1, 2, 4, 5, 6, 7]
    assert {process.poll() for process in processes} == {None}


def test_kill(start: Callable[..., list[Process]]) -> None:
    stopped, told, left = start(ECHO, [{}, {}, {}])
    os.kill(stopped.pid, signal.SIGSTOP)
    stopped.kill()
    told.kill(signal.SIGTERM)
    assert stopped.wait(LIMIT) == -signal.SIGKILL
    assert told.wait(LIMIT) == -signal.SIGTERM
    told.kill()  # its pid may be another process's by now
    assert told.poll() == -signal.SIGTERM
    with pytest.raises(ValueError):
        left.kill(9999)
    assert left.wait(0.05) is None and ask(left, 0) == [None, 0]


def test_wait_returns_when_the_time_is_over(start: Callable[..., list[Process]]) -> None:
    (process,) = start(ECHO, [{}])
    assert process.wait(0) is None
    before = time.monotonic()
    assert process.wait(0.2) is None
    assert time.monotonic() - before >= 0.2


def test_two_worlds_side_by_side(server: ForkServer) -> None:
    """Started by two threads at once, each with channels of its own; the end of one is nothing to the other."""
    both = threading.Barrier(2)
    worlds: dict[str, list[Process]] = {}

    def run(world: str) -> None:
        both.wait(LIMIT)
        worlds[world] = server.start(ECHO, [{"name": [world, rank]} for rank in range(12)])

    threads = [threading.Thread(target=run, args=(world,)) for world in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    with ExitStack() as channels:
        for process in worlds["a"] + worlds["b"]:
            channels.enter_context(closing(process.channel))
        for world, processes in worlds.items():
            assert [ask(p, "x") for p in processes] == [[[world, rank], "x"] for rank in range(12)]
        for process in worlds["a"]:
            process.kill()
        assert {process.wait(LIMIT) for process in worlds["a"]} == {-signal.SIGKILL}
        assert [ask(p, "y") for p in worlds["b"]] == [[["b", rank], "y"] for rank in range(12)]
    assert {process.wait(LIMIT) for process in worlds["b"]} == {0}


def test_many_threads_wait_each_for_its_own(start: Callable[..., list[Process]]) -> None:
    processes = start(ECHO, [{}] * 12)
    ended = {process.pid: threading.Event() for process in processes}

    def wait(process: Process) -> None:
        if process.wait(LIMIT) == 0:
            ended[process.pid].set()

    threads = [threading.Thread(target=wait, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for process in reversed(processes):
        assert not ended[process.pid].is_set()
        process.channel.close()
        assert ended[process.pid].wait(LIMIT)
    for thread in threads:
        thread.join(LIMIT)


def test_operations_with_several_threads(start: Callable[..., list[Process]]) -> None:
    processes = start("tests.launch.programs:multiply", [{"threads": 2}, {"threads": 3}] * 2)
    answers = [receive(process) for process in processes]
    assert [threads for _, threads in answers] == [2, 3, 2, 3]
    assert [total for total, _ in answers] == pytest.approx([32 + 2 * math.log(512)] * 4, rel=1e-5)
    assert {process.wait(LIMIT) for process in processes} == {0}


def test_a_large_spec(start: Callable[..., list[Process]]) -> None:
    (process,) = start("tests.launch.programs:size", [{"data": bytes(20_000_000)}])
    assert receive(process) == 20_000_000


def test_what_a_process_finds() -> None:
    """Nobody else's descriptors, no terminal, and signals as usual whatever the driver does with them."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        server = ForkServer(preload=("tests.launch.programs", "torch", "numpy"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, before)
    with server:
        server.start(ECHO, [{}] * 3)
        for process in server.start(
            "tests.launch.programs:circumstances", [{"modules": ["torch", "numpy"]}] * 3
        ):
            found = receive(process)
            opened = {number: target for number, target in found["descriptors"].items() if target is not None}
            assert set(opened) == {0, 1, 2, found["channel"]} and opened[0] == "/dev/null"
            assert found["parent"] == server.pid and found["session"] != os.getsid(0)
            assert (found["blocked"], found["interrupt"], found["default"]) == ([], True, [True, True])
            assert found["modules"] == [True, True]
            assert process.wait(LIMIT) == 0


def test_environment(start: Callable[..., list[Process]]) -> None:
    """One start's is not the next one's, and not the driver's."""
    names = ["EXPERTMESH_TEST_A", "PATH"]
    program, specs = "tests.launch.programs:circumstances", [{"names": names}]
    (one,) = start(program, specs, {"EXPERTMESH_TEST_A": "ä = 1"})
    (two,) = start(program, specs)
    path = os.environ["PATH"]
    assert receive(one)["environment"] == {"EXPERTMESH_TEST_A": "ä = 1", "PATH": path}
    assert receive(two)["environment"] == {"EXPERTMESH_TEST_A": None, "PATH": path}
    assert "EXPERTMESH_TEST_A" not in os.environ


def test_the_search_path_is_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is preloaded is found there; the working directory is not searched."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "preloaded.py").write_text("import os\nPID = os.getpid()\n")
    (tmp_path / "a" / "b" / "program.py").write_text(
        "import preloaded\ndef main(spec, channel):\n    channel.send(preloaded.PID)\n"
    )
    (tmp_path / "socket.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "a" / "b")
    monkeypatch.syspath_prepend(tmp_path / "a")
    with ForkServer(preload=["preloaded"]) as server:
        assert receive(server.start("program:main", [{}])[0]) == server.pid


@pytest.mark.parametrize("program", ["", "module", "module:", ":function"])
def test_a_malformed_program(server: ForkServer, program: str) -> None:
    with pytest.raises(ValueError, match="is not of the form package"):
        server.start(program, [{}])


def test_a_spec_that_is_not_plain_data(start: Callable[..., list[Process]], server: ForkServer) -> None:
    with pytest.raises(TypeError):
        server.start(ECHO, [{"name": object()}])
    assert ask(start(ECHO, [{}])[0], 1) == [None, 1]


@pytest.mark.parametrize("spare", [3, 20])
def test_no_room_for_so_many(spare: int) -> None:
    """Too few descriptors for the channels, or for the channels and the processes: none is left half started."""
    with ForkServer(["json"]) as server:
        (first,) = server.start(ECHO, [{}])
        held = max(map(int, os.listdir(f"/proc/{server.pid}/fd")))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (held + 1 + spare,) * 2)
        with pytest.raises(RankFailure, match=r"the fork server started no processes: .*files"):
            server.start(ECHO, [{}] * 16)
        assert [child.pid for child in psutil.Process(server.pid).children()] == [first.pid]
        assert [ask(process, 1) for process in server.start(ECHO, [{}])] == [[None, 1]]


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [
        (64, 4096, "40\n"),
        (64, 100, r"InputError 11\d files have to be open at once .* may open 100: .*\n"),
        (16, 16, r"InputError 3\d files have to be open .*\n"),
    ],
)  # fmt: skip
def test_how_many_files_may_be_open(soft: int, hard: int, said: str) -> None:
    """As many as are needed, where the system allows that."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FORTY, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert re.fullmatch(said, done.stdout) and not done.stderr, done


def test_the_server_is_killed(start: Callable[..., list[Process]]) -> None:
    before = children()
    with ForkServer() as server:
        processes = server.start(ECHO, [{}] * 8)
        ended, *others = processes
        ended.channel.close()
        assert ended.wait(LIMIT) == 0
        os.kill(server.pid, signal.SIGKILL)
        assert end_of([process.pid for process in processes])
        with pytest.raises(ChannelClosed):
            receive(others[0])
        assert {process.wait(LIMIT) for process in others} == {-signal.SIGKILL} and ended.poll() == 0
        others[0].kill()
        with pytest.raises(RankFailure, match="started no processes: it ended with status -9"):
            server.start(ECHO, [{}])
    assert children() == before


def test_the_server_cannot_start(capfd: pytest.CaptureFixture[str]) -> None:
    before = children()
    with ForkServer(preload=["no_such_module_anywhere"]) as server:
        for _ in range(2):
            with pytest.raises(RankFailure, match="ModuleNotFoundError: No module named 'no_such_module"):
                server.start(ECHO, [{}])
    assert children() == before
    assert "Traceback" in capfd.readouterr().err


def test_the_driver_is_killed() -> None:
    command = [sys.executable, "-c", DRIVER]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 9 and all(map(alive, pids))
        driver.kill()
    assert end_of(pids)


def test_close_leaves_nothing() -> None:
    gc.collect()
    opened, before = len(os.listdir("/proc/self/fd")), children()
    server = ForkServer()
    processes = server.start(ECHO, [{}] * 8) + server.start(END, [{"exit": 5}])
    os.kill(processes[0].pid, signal.SIGSTOP)
    pids = [server.pid, *(process.pid for process in processes)]
    processes[-1].wait(LIMIT)
    server.close()
    assert not [pid for pid in pids if psutil.pid_exists(pid)] and children() == before
    assert len(os.listdir("/proc/self/fd")) == opened
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 8 + [5]
    server.close()
    with pytest.raises(RankFailure, match="started no processes: it is closed"):
        server.start(ECHO, [{}])


def test_close_ends_those_who_wait() -> None:
    server = ForkServer()
    processes = server.start(ECHO, [{}] * 2)
    statuses: list[int | None] = []
    threads = [threading.Thread(target=lambda p=p: statuses.append(p.wait(LIMIT))) for p in processes]
    for thread in threads:
        thread.start()
    server.close()
    for thread in threads:
        thread.join(LIMIT)
    assert statuses == [-signal.SIGKILL] * 2


def test_close_of_a_server_that_still_imports() -> None:
    before = children()
    server = ForkServer()
    server.close()
    assert not psutil.pid_exists(server.pid) and children() == before


def test_close_of_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.launch.forkserver.GRACE", 0.2)
    server = ForkServer()
    (process,) = server.start(ECHO, [{}])
    os.kill(server.pid, signal.SIGSTOP)
    server.close()
    assert end_of([process.pid]) and process.poll() == -signal.SIGKILL
    assert not re.search(rf"\b{server.pid}\b", " ".join(map(str, children())))
