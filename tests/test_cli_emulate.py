"""`expertmesh emulate`: programs on an emulated cluster, what they find there, how they end, and what is left."""

import argparse
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from expertmesh.cli import COMMANDS, main
from expertmesh.commands.emulate import ELSEWHERE, SPREAD, _check_command
from expertmesh.emulation.bridge import can_delay
from tests.support.emulation import EMULATE, LIMIT, Start, emulating, needs_a_cluster, why_not

PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
SLEEP = "print(os.getpid(), flush=True)\ntime.sleep(1000)"
DEAF = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEP}"
# Stands in for a command of expertmesh, before that is imported: the only process with this variable.
STAND_IN = """
import os
if "EXPERTMESH_CLUSTER" in os.environ:
    import stand_in
    os._exit(stand_in.main() or 0)
"""
TORCHRUN = """
import os, socket, torch
from torch import distributed
distributed.init_process_group("gloo")
total = torch.ones(1) * distributed.get_rank()
distributed.all_reduce(total)
line = [distributed.get_rank(), distributed.get_world_size(), total.item(), os.environ["LOCAL_RANK"]]
os.write(1, f"{line} {socket.gethostname()}\\n".encode())
distributed.destroy_process_group()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `expertmesh emulate`; afterwards nothing of it may be left."""
    with emulating(lambda: EMULATE, tmp_path) as call:
        yield call


@pytest.fixture
def run(start: Start) -> Callable[..., tuple[int, list[str], str]]:
    """Runs it: exit code, lines of standard output, standard error."""

    def call(*arguments: str, text: str = "") -> tuple[int, list[str], str]:
        process = start(*arguments)
        out, err = process.communicate(text, timeout=LIMIT)
        return process.returncode, out.splitlines(), err

    return call


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], None]:
    """Makes main() of a text what a command of expertmesh does."""

    def write(body: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(STAND_IN)
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "stand_in.py").write_text(
            f"import json, os, signal, socket, sys, time\ndef main():\n{lines}\n"
        )

    return write


def python(body: str) -> list[str]:
    return ["--", sys.executable, "-c", f"import os, signal, socket, subprocess, sys, time\n{body}"]


def ends(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def lines_of(process: "subprocess.Popen[str]", count: int) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().rstrip("\n") for _ in range(count))


def keeper_of(process: "subprocess.Popen[str]") -> psutil.Process:
    (keeper,) = psutil.Process(process.pid).children()
    return keeper


@needs_a_cluster
@pytest.mark.parametrize("delay", [[], ["--delay", "0.2ms"]])
def test_a_program_on_each_node(run: Callable[..., tuple[int, list[str], str]], delay: list[str]) -> None:
    body = """
print(socket.gethostname(), os.environ["RANK"], os.environ["WORLD_SIZE"], sys.stdin.read() == "")
print("to standard error", file=sys.stderr, end="")
if os.environ["RANK"] == "0":
    with socket.create_server((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as server:
        for _ in range(2):
            server.accept()[0].close()
else:
    for _ in range(1000):
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""
    code, out, err = run("--nodes", "3", *delay, *python(body), text="not for them")
    assert code == 0 and sorted(out) == [f"[node{n}] node{n} {n} 3 True" for n in range(3)]
    assert sorted(err.splitlines()) == [f"[node{n}] to standard error" for n in range(3)]


@needs_a_cluster
def test_what_a_program_finds(run: Callable[..., tuple[int, list[str], str]]) -> None:
    """Nobody else's descriptors, signals as usual, and the environment of torchrun."""
    body = """
for name in sorted(os.listdir("/proc/self/fd"), key=int)[:-1]:
    print("descriptor", name)
print(*(signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGCHLD, signal.SIGQUIT)))
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.getsid(0) == os.getpid())
for name in sorted(os.environ):
    if name.startswith(("PET_", "GROUP_", "LOCAL_", "MASTER_", "NODE_R", "GLOO_", "EXPERTMESH_C")):
        print(name, os.environ[name])
"""
    _, out, _ = run("--nodes", "2", "--cards", "3", *python(body))
    found = [line.removeprefix("[node1] ") for line in out if line.startswith("[node1] ")]
    assert found == [
        *(f"descriptor {n}" for n in range(3)), "True True True", "set() True",
        "GLOO_SOCKET_IFNAME eth0", "GROUP_RANK 1", "GROUP_WORLD_SIZE 2", "LOCAL_RANK 0", "LOCAL_WORLD_SIZE 1",
        "MASTER_ADDR 10.77.0.1", "MASTER_PORT 29500", "NODE_RANK 1", "PET_LOCAL_ADDR 10.77.0.2", "PET_NNODES 2",
        "PET_NPROC_PER_NODE 3", "PET_RDZV_BACKEND c10d", "PET_RDZV_CONF is_host=0",
        "PET_RDZV_ENDPOINT 10.77.0.1:29400", "PET_RDZV_ID expertmesh",
    ]  # fmt: skip
    assert "[node0] PET_RDZV_CONF is_host=1" in out


@needs_a_cluster
def test_torchrun(run: Callable[..., tuple[int, list[str], str]], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TORCHRUN)
    logs = ["--log-dir", str(tmp_path / "logs")]  # it would leave some among the temporary files
    code, out, err = run("--nodes", "2", "--cards", "2", "--", "torchrun", *logs, str(tmp_path / "script.py"))
    assert code == 0, err
    assert sorted(out) == [f"[node{n // 2}] [{n}, 4, 6.0, '{n % 2}'] node{n // 2}" for n in range(4)]


@needs_a_cluster
@pytest.mark.parametrize(
    "form", [["generate"], ["expertmesh", "generate"], ["python3", "-m", "expertmesh", "generate"]]
)
def test_a_command_of_expertmesh(
    run: Callable[..., tuple[int, list[str], str]], stand_in: Callable[[str], None], form: list[str]
) -> None:
    """Once, on the first node, with the streams of `emulate` and what is to know about the cluster."""
    stand_in(
        "cluster = json.loads(os.environ['EXPERTMESH_CLUSTER'])\n"
        "opened = [os.path.exists(node['namespace']) for node in cluster['nodes']]\n"
        "print(json.dumps([socket.gethostname(), sys.orig_argv[1:], sys.stdin.read(), opened, cluster]))\n"
        "print('to standard error', file=sys.stderr)\nsys.stdout.flush()\nreturn 7"
    )
    options = ["--nodes", "2", "--cards", "3", "--kill", "5@1.5", "--kill", "0@2"]
    code, out, err = run(*options, "--", *form, "-p", "--", "--nodes", "9", text="ä\nb")
    host, words, text, opened, cluster = json.loads(*out)
    assert (code, err, host, text, opened) == (7, "to standard error\n", "node0", "ä\nb", [True, True])
    assert words == ["-m", "expertmesh", "generate", "-p", "--", "--nodes", "9"]
    assert (cluster["cards"], cluster["kill"]) == (3, [[5, 1.5], [0, 2.0]])
    for number, node in enumerate(cluster["nodes"]):
        del node["namespace"]
        address = f"10.77.0.{number + 1}"
        assert node == {"number": number, "host": f"node{number}", "address": address, "interface": "eth0"}


@needs_a_cluster
def test_a_command_that_joins_is_on_each_node(
    run: Callable[..., tuple[int, list[str], str]], stand_in: Callable[[str], None], tmp_path: Path
) -> None:
    stand_in("print(sys.orig_argv[1:], os.environ['RANK'], flush=True)")
    (tmp_path / "sitecustomize.py").write_text(STAND_IN.replace("EXPERTMESH_CLUSTER", "PET_NNODES"))
    code, out, _ = run("--nodes", "2", "--", "expertmesh", "generate", "--join", "x")
    words = ["-m", "expertmesh", "generate", "--join", "x"]
    assert code == 0 and sorted(out) == [f"[node{n}] {words} {n}" for n in range(2)]


@needs_a_cluster
def test_a_command_as_it_is(run: Callable[..., tuple[int, list[str], str]], tiny_folder: Path) -> None:
    """It need not know that it is in an emulated cluster. What it refuses is its own matter."""
    code, out, _ = run("--nodes", "2", "doctor")
    assert code == 0 and any("node0" in line for line in out)
    code, out, err = run("--nodes", "2", "generate", "/nowhere", "-p", "x")
    assert (code, out) == (2, []) and "no such folder" in err
    prompt = ["-p", "-", "--max-tokens", "2"]
    code, out, _ = run("--nodes", "2", "--", "generate", str(tiny_folder), *prompt, text="the")
    assert code == 0 and out


@needs_a_cluster
def test_lines_are_whole(run: Callable[..., tuple[int, list[str], str]]) -> None:
    body = """
for piece in ("a" * 5000, "b" * 5000 + "\\n", "\\n", "c" * 200_000 + "\\nthe end"):
    sys.stdout.write(piece)
    sys.stdout.flush()
    time.sleep(0.02)
"""
    _, out, _ = run("--nodes", "2", *python(body))
    assert {len(line) for line in out if "a" in line} == {len("[node0] ") + 10_000}
    assert sorted(line for line in out if line.endswith("] ")) == ["[node0] ", "[node1] "]
    assert sum(line.count("c") for line in out) == 400_000
    assert {line for line in out if "the" in line} == {"[node0] the end", "[node1] the end"}
    assert all(line.startswith(("[node0] ", "[node1] ")) for line in out)


@needs_a_cluster
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", 0),
        ("sys.exit(3 if os.environ['RANK'] == '1' else 0)", 3),
        ("os.kill(os.getpid(), 9 if os.environ['RANK'] == '1' else 0)", 137),
        # The first by time, not by number.
        (
            "time.sleep(0 if os.environ['RANK'] == '1' else 1)\nsys.exit(5 if os.environ['RANK'] == '1' else 4)",
            5,
        ),
    ],
)
def test_exit_codes_of_several(
    run: Callable[..., tuple[int, list[str], str]], body: str, expected: int
) -> None:
    code, _, err = run("--nodes", "2", *python(body))
    assert code == expected
    assert ("the program of node1 ended with status" in err) == (expected != 0)


@needs_a_cluster
@pytest.mark.parametrize(
    ("body", "expected"), [("return 5", 5), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_exit_codes_of_one(
    run: Callable[..., tuple[int, list[str], str]], stand_in: Callable[[str], None], body: str, expected: int
) -> None:
    stand_in(body)
    assert run("--nodes", "2", "--", "generate") == (expected, [], "")


@needs_a_cluster
@pytest.mark.parametrize(
    ("kills", "status", "expected"), [([1], 0, 0), ([1], 6, 6), ([0, 1, 2], 0, 137)]
)  # fmt: skip
def test_kill(
    run: Callable[..., tuple[int, list[str], str]], kills: Sequence[int], status: int, expected: int
) -> None:
    """The survivors' exit codes are what counts."""
    options = [word for number in kills for word in ("--kill", f"{number}@0.3")]
    body = f"time.sleep(1000 if int(os.environ['RANK']) in {kills} else 1)\nprint('survived')\nsys.exit({status})"
    code, out, err = run("--nodes", "3", *options, *python(body))
    assert code == expected and sorted(out) == [f"[node{n}] survived" for n in range(3) if n not in kills]
    assert err.count("was killed") == len(kills)


@needs_a_cluster
@pytest.mark.parametrize("delay", [[], ["--delay", "0.1ms"]])
def test_cut(run: Callable[..., tuple[int, list[str], str]], delay: list[str]) -> None:
    """The first node asks the others for ever; the one that is cut off hears nothing of it, and the other answers."""
    body = """
rank, address = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], 1234)
if rank == 0:
    with socket.create_server(address) as server:
        ends = [server.accept()[0] for _ in range(2)]
    first, second = sorted(ends, key=lambda end: end.recv(1))
    asked = 0
    second.settimeout(1)
    try:
        while True:
            second.sendall(b"?")
            asked += len(second.recv(1))
            time.sleep(0.001)
    except TimeoutError:
        print("hangs", asked > 0)
    first.sendall(b"?")
    print("answers", first.recv(1))
else:
    end = socket.socket()
    while end.connect_ex(address):
        end.close()
        end = socket.socket()
        time.sleep(0.02)
    end.sendall(b"%d" % rank)
    end.settimeout(2 if rank == 2 else None)  # longer than the other end asks
    try:
        while end.recv(1):
            end.sendall(b"!")
    except TimeoutError:
        print("hangs")
"""
    code, out, err = run("--nodes", "3", *delay, "--cut", "2@2.5", *python(body))
    assert code == 0 and sorted(out) == ["[node0] answers b'!'", "[node0] hangs True", "[node2] hangs"]
    assert err == "expertmesh: node2 is cut off\n"


@needs_a_cluster
def test_what_a_program_leaves_behind_is_killed(
    run: Callable[..., tuple[int, list[str], str]], tmp_path: Path
) -> None:
    """When it ends, while others run; also where it has got away from its parent and session."""
    file = tmp_path / "pid"
    body = f"""
if os.environ["RANK"] == "0":
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    with open({str(file)!r} + "~", "w") as written:
        written.write(str(left.pid))
    os.rename({str(file)!r} + "~", {str(file)!r})
    os._exit(0)
while not os.path.exists({str(file)!r}):
    time.sleep(0.02)
pid = open({str(file)!r}).read()
while os.path.exists("/proc/" + pid):
    time.sleep(0.02)
print("gone")
"""
    assert run("--nodes", "2", *python(body)) == (0, ["[node1] gone"], "")


@needs_a_cluster
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_everything(start: Start, number: signal.Signals) -> None:
    process = start("--nodes", "3", *python(SLEEP))
    lines_of(process, 3)
    process.send_signal(number)
    code, _, err = ends(process)
    assert code == 128 + number and err.count("KeyboardInterrupt\n") == 3 * (number == signal.SIGINT)


@needs_a_cluster
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_does_not_hear_a_signal_is_killed_at_the_second(start: Start, number: signal.Signals) -> None:
    process = start("--nodes", "2", *python(DEAF))
    lines_of(process, 2)
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert ends(process)[0] == 137


@needs_a_cluster
def test_who_does_not_hear_a_signal_is_killed(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import expertmesh.emulation.front as e\ne.GRACE = 0.5\n")
    process = start("--nodes", "2", *python(DEAF))
    lines_of(process, 2)
    process.send_signal(signal.SIGTERM)
    assert ends(process)[0] == 137


@needs_a_cluster
def test_ctrl_c_is_what_a_command_makes_of_it(start: Start, stand_in: Callable[[str], None]) -> None:
    stand_in(
        "for line in sys.stdin:\n    try:\n        print(line, end='', flush=True)\n        time.sleep(1000)\n"
        "    except KeyboardInterrupt:\n        print('interrupted', flush=True)\nreturn 3"
    )
    process = start("--nodes", "2", "chat")
    assert process.stdin is not None and process.stdout is not None
    for text in ("one", "two"):
        process.stdin.write(f"{text}\n")
        process.stdin.flush()
        assert lines_of(process, 1) == [text]
        process.send_signal(signal.SIGINT)
        assert lines_of(process, 1) == ["interrupted"]
        time.sleep(1.1)  # twice within a second would end it
    assert ends(process)[0] == 3


@needs_a_cluster
@pytest.mark.parametrize("delay", [[], ["--delay", "0.2ms"]])
def test_the_front_is_killed(start: Start, delay: list[str]) -> None:
    body = f"subprocess.Popen(['sleep', '1000'], start_new_session=True)\n{DEAF}"
    process = start("--nodes", "2", *delay, *python(body))
    lines_of(process, 2)
    process.kill()
    assert process.wait(LIMIT) == -signal.SIGKILL


@needs_a_cluster
@pytest.mark.parametrize("delay", [[], ["--delay", "0.2ms"]])
def test_the_keeper_is_killed(start: Start, delay: list[str]) -> None:
    body = f"subprocess.Popen(['sleep', '1000'], start_new_session=True)\n{DEAF}"
    process = start("--nodes", "2", *delay, *python(body))
    lines_of(process, 2)
    keeper_of(process).kill()
    code, _, err = ends(process)
    assert code == 1 and err == (
        "expertmesh: the process that keeps the emulated cluster has died; all in it has been ended\n"
    )


@needs_a_cluster
@pytest.mark.skipif(
    why_not() is None and can_delay(), reason="the kernel has netem: there is no such process"
)
def test_the_switch_is_killed(start: Start) -> None:
    process = start("--nodes", "2", "--delay", "0.2ms", *python(SLEEP))
    pids = {int(line.split()[1]) for line in lines_of(process, 2)}
    (switch,) = [p for p in keeper_of(process).children() if p.pid not in pids]
    switch.kill()
    code, _, err = ends(process)
    assert code == 1 and "expertmesh: the switch of the emulated cluster has died; all in it" in err


@needs_a_cluster
def test_nobody_reads_the_output(start: Start) -> None:
    process = start("--nodes", "2", *python("while True: print('more', flush=True)"))
    lines_of(process, 2)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(LIMIT) == 141


@needs_a_cluster
def test_a_program_that_cannot_be_started(
    run: Callable[..., tuple[int, list[str], str]], tmp_path: Path
) -> None:
    (tmp_path / "program").write_bytes(b"\x7fELF and no more")
    (tmp_path / "program").chmod(0o755)
    code, out, err = run("--nodes", "2", "--", str(tmp_path / "program"))
    assert (code, out) == (2, []) and "Exec format error" in err and err.count("\n") == 1


@needs_a_cluster
def test_without_the_right(
    run: Callable[..., tuple[int, list[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose = f"import ctypes, os, sys\nctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_ADMIN})\n"
    program = [sys.executable, "-c", f"{lose}os.execv(sys.executable, sys.argv[1:])", *EMULATE]
    monkeypatch.setattr("tests.test_cli_emulate.EMULATE", program)
    code, out, err = run("--nodes", "2", "--", "sleep", "1")
    assert (code, out) == (2, [])
    assert err.startswith("expertmesh: to emulate a cluster takes CAP_SYS_ADMIN: run it as root")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "no command: give one behind --"),
        (["--nodes", "2", "--"], "no command: give one behind --"),
        (["--nodes", "0", "--", "sleep", "1"], "--nodes is 0, but must be from 1 to 128"),
        (["--nodes", "129", "--", "sleep", "1"], "--nodes is 129, but must be from 1 to 128"),
        (["--nodes", "2", "--cards", "0", "--", "sleep", "1"], "--cards is 0, but must be from 1"),
        (["--nodes", "2", "--link", "fast", "--", "sleep", "1"], "--link 'fast': not a rate like 50mbit"),
        (["--nodes", "2", "--link", "0", "--", "sleep", "1"], "--link '0': must be from 1kbit"),
        (["--nodes", "2", "--delay", "1", "--", "sleep", "1"], "--delay '1': not a time like 0.2ms"),
        (["--nodes", "2", "--cut", "2@1", "--", "sleep", "1"], "--cut '2@1': there is no node 2; the last one is 1"),
        (["--nodes", "2", "--cut=-1@1", "--", "sleep", "1"], "--cut '-1@1': not of the form 1@2.5 (node @"),
        (["--nodes", "2", "--cut", "1@-1", "--", "sleep", "1"], "--cut '1@-1': not of the form 1@2.5"),
        (["--nodes", "2", "--cut", "1@nan", "--", "sleep", "1"], "--cut '1@nan': not of the form 1@2.5"),
        (["--nodes", "2", "--cut", "1", "--", "sleep", "1"], "--cut '1': not of the form 1@2.5"),
        (["--nodes", "2", "--cards", "2", "--kill", "2@1", "--", "sleep", "1"], "--kill '2@1': there is no node 2"),
        (["--nodes", "2", "--cards", "2", "--kill", "4@1", "chat"], "there is no rank 4; the last one is 3"),
        (["--nodes", "2", "--cards", "2", "--kill", "2@1", "--", "chat", "--join", "x"], "there is no node 2"),
        (["--nodes", "2", "--", "memory", "--layout", "2x8"], "memory knows one machine only: run it without emulate"),
        (["--nodes", "2", "--", "expertmesh", "bench", "transport"], "bench transport knows one machine only"),
        (["--nodes", "2", "--", "plan", "--card", "h800"], "expertmesh: plan knows one machine only"),
        (["--nodes", "2", "plan", "simulate", "--card", "h800"], "plan simulate knows one machine only"),
        (["--nodes", "2", "emulate", "--nodes", "2", "chat"], "emulate knows one machine only"),
        (["--nodes", "2", "--kill", "1@1", "doctor"], "--kill: doctor has no ranks on nodes; generate, chat, serve"),
        (["--nodes", "2", "--", "no-such-program"], "no-such-program: no such program, and no command of"),
    ],
)  # fmt: skip
def test_bad_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is made."""
    monkeypatch.setattr("expertmesh.commands.emulate.Emulation", None)
    code = main(["emulate", *arguments])
    out, err = capsys.readouterr()
    assert (
        (code, out) == (2, "") and err.startswith("expertmesh: ") and err.count("\n") == 1 and message in err
    )


def test_the_commands_that_it_knows_of() -> None:
    """Spread are those whose ranks may be on several machines."""
    found: dict[str, bool] = {}
    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"expertmesh.commands.{name}").add_arguments(parser)
        subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        inner = [(f"{name} {what}", sub) for action in subparsers for what, sub in action.choices.items()]
        alone = [(name, parser)] if all(not action.required for action in subparsers) else []
        found |= {full: bool(sub.get_default("clustered")) for full, sub in [*alone, *inner]}
    assert set(SPREAD) == {name for name, spread in found.items() if spread}
    assert set(ELSEWHERE) == {name for name, spread in found.items() if not spread} - {"doctor"}


def test_without_a_command_there_is_nothing_to_refuse() -> None:
    """It says itself what is missing."""
    _check_command([], kills=False)


def test_missing_tools(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code = main(["emulate", "--nodes", "2", "doctor"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.endswith("takes the program ip, tc, bridge: install iproute2\n")
