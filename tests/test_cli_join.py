"""Commands on several machines, started by torchrun on each or by the same line with --join: what they print, how they
fail, and that nothing is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from expertmesh.cli import main
from expertmesh.commands.options import without_join
from expertmesh.emulation.cluster import EmulatedCluster, Node
from expertmesh.emulation.namespaces import configure, enter
from tests.support.emulation import EMULATE, LIMIT, Said, Start, emulating, needs_a_cluster, on

GENERATE = ["generate", "-p", "Once upon a time", "--temperature", "0", "--dtype", "float32", "--json"]
SHORT, LONG = ["--max-tokens", "8"], ["--max-tokens", "1900", "--ignore-eos"]
TOKENS = [961, 3441, 270, 1551, 886, 546, 270, 2523]  # of one rank
MEET = "10.77.0.1:29500"
READY = "MB a rank"  # is said when all have been loaded
DOCTOR = [sys.executable, "-m", "expertmesh", "doctor", "--ranks"]
ROLL = """
import contextlib, io, os, socket, sys, time
from expertmesh.cli import main
node = int(os.environ["RANK"])

def call(name, *words):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(["generate", "-p", "x", "--timeout", "2", *words])
    print(name, code, err.getvalue(), sep="|", end="")

call("missing", "--nodes", "4", "--cards", "1", "--join", "10.77.0.1:29501")
call("nobody", "--nodes", "3", "--cards", "1", "--join", "10.77.0.9:29502")
if node == 0:
    with socket.create_server(("10.77.0.1", 29503)):
        call("in use", "--nodes", "3", "--cards", "1", "--join", "10.77.0.1:29503")
        time.sleep(2.5)
else:
    call("in use", "--nodes", "3", "--cards", "1", "--join", "10.77.0.1:29503")
call("cards", "--nodes", "3", "--cards", str(1 + node // 2), "--join", "10.77.0.1:29504")
if node != 1:
    call("nodes", "--nodes", str(2 + node // 2), "--cards", "1", "--join", "10.77.0.1:29505")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with emulating(lambda: EMULATE, tmp_path) as call:
        yield call


def joined(nodes: int, cards: int, *words: str) -> list[str]:
    shape = ["--nodes", str(nodes), "--cards", str(cards)]
    return [*shape, "--", "expertmesh", *GENERATE, *words, *shape, "--join", MEET]


def outputs(out: str) -> list[list[int]]:
    """Token ids of the only line there may be, of the first node."""
    (line,) = out.splitlines()
    return [output["token_ids"] for output in json.loads(line.removeprefix("[node0] "))]


def ends(process: "subprocess.Popen[str]", err: Said) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and what expertmesh said on standard error."""
    assert process.stdout is not None
    out = process.stdout.read()
    code = process.wait(LIMIT)
    return code, out, [line for line in err.all() if "] expertmesh: " in line]


def agent_of(process: "subprocess.Popen[str]", node: int) -> psutil.Process:
    """The program of a node."""
    (keeper,) = psutil.Process(process.pid).children()
    return sorted(keeper.children(), key=lambda child: child.pid)[node]


def engine_of(process: "subprocess.Popen[str]") -> dict[str, object]:
    """What `doctor --ranks` shows of the engine in there."""
    own = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    done = subprocess.run([*DOCTOR, "--json"], capture_output=True, text=True, check=True)
    (found,) = [engine for engine in json.loads(done.stdout)["engines"] if engine["process"] in own]
    return dict(found)


@needs_a_cluster
@pytest.mark.parametrize(("nodes", "cards"), [(2, 2), (8, 1)])
def test_torchrun(start: Start, tmp_path: Path, nodes: int, cards: int) -> None:
    logs = ["--log-dir", str(tmp_path / "logs")]  # it would leave some among the temporary files
    words = ["torchrun", *logs, "-m", "expertmesh", *GENERATE, *SHORT]
    process = start("--nodes", str(nodes), "--cards", str(cards), "--", *words)
    out, err = process.communicate(timeout=2 * LIMIT)
    assert process.returncode == 0 and outputs(out) == [TOKENS], err
    table = [line.removeprefix("[node0] ").split() for line in err.splitlines() if "eth0" in line]
    assert [row[:4] for row in table] == [
        [f"{n}", f"node{n}", "eth0", f"10.77.0.{n + 1}"] for n in range(nodes)
    ]


@needs_a_cluster
def test_any_launcher_that_sets_the_variables(start: Start) -> None:
    """As `emulate` does for programs that are not ours. The store is then rank 0's."""
    process = start("--nodes", "2", "--", "env", sys.executable, "-m", "expertmesh", *GENERATE, *SHORT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and outputs(out) == [TOKENS], err


@needs_a_cluster
def test_the_same_line_on_three_machines(start: Start) -> None:
    """Dollars mean something to the launcher, and nothing to us."""
    process = start(*joined(3, 2, *SHORT, "-p", "$$ ${local_rank} $HOME"))
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    first, second = json.loads(out.removeprefix("[node0] "))
    assert first["token_ids"] == TOKENS and second["prompt"] == "$$ ${local_rank} $HOME"
    lines = [line.removeprefix("[node0] ") for line in err.splitlines()]
    assert lines[0].split() == ["node", "host", "interface", "address", "ports", "ranks", "TP", "groups"]
    for node, line in enumerate(lines[1:4]):
        cells = line.split()
        assert cells[:4] == [str(node), f"node{node}", "eth0", f"10.77.0.{node + 1}"]
        assert cells[5:] == [f"{2 * node}-{2 * node + 1}", str(node)]
    assert lines[4].startswith("3 nodes x 2 cards as processes") and lines[5].startswith(READY)
    assert len(lines) == 9 and "tokens/s" in lines[6] and lines[7].startswith("MB sent")
    assert lines[8].startswith("steps: ")


@needs_a_cluster
def test_ranks_that_run_and_one_that_is_killed(start: Start) -> None:
    """One cluster: where its ranks stand, also while one is stopped; SIGUSR1; and what all say when one dies."""
    process = start(*joined(2, 2, *LONG))
    err = Said(process.stderr)
    err.wait_for(READY)
    engine = engine_of(process)
    ranks = {rank["rank"]: rank for rank in engine["ranks"]}  # type: ignore[attr-defined]
    assert list(ranks) == [0, 1, 2, 3] and str(engine["during"]).startswith("step ")
    assert [(r["node"], r["card"], r["host"]) for r in ranks.values()] == [
        (n, c, f"node{n}") for n in range(2) for c in range(2)
    ]
    assert all("File " in rank["stands"] for rank in ranks.values())
    assert " generate -p Once upon a time" in str(engine["command"])
    stopped = ranks[3]["process"]
    os.kill(stopped, signal.SIGSTOP)
    done = subprocess.run(DOCTOR, capture_output=True, text=True, check=True)
    assert f"process {stopped}: does not answer within 2 s" in done.stdout
    os.kill(stopped, signal.SIGCONT)
    os.kill(ranks[1]["process"], signal.SIGUSR1)
    err.wait_for(f"rank 1 (node 0, card 1) on node0, process {ranks[1]['process']}, step")
    os.kill(int(str(engine["process"])), signal.SIGUSR1)
    err.wait_for(f"rank 2 (node 1, card 0) on node1, process {ranks[2]['process']}, step")
    os.kill(stopped, signal.SIGKILL)
    code, out, said = ends(process, err)
    assert (code, out) == (1, "")
    cause = "rank 3 (node 1, card 1) on node1 died in step "
    assert len(said) == 4 and all(cause in line for line in said)
    assert sum("ends: " in line for line in said) == 3
    assert [line for line in err.lines if "Traceback" in line or "torch/distributed" in line] == []


@contextmanager
def line_on_each(
    cluster: EmulatedCluster, folder: Path, *words: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """The same line on each machine, started from here."""
    line = ["-m", "expertmesh", *GENERATE, *words, "--join", MEET]
    with emulating(lambda: [sys.executable], folder) as start:
        yield [start(*line, preexec_fn=partial(enter, n.namespace, n.host)) for n in cluster.nodes]


@needs_a_cluster
def test_a_machine_that_is_cut_off(tmp_path: Path) -> None:
    """Both sides say it."""
    words = [*LONG, "--nodes", "2", "--cards", "2", "--timeout", "5"]
    with EmulatedCluster(2) as cluster, line_on_each(cluster, tmp_path, *words) as machines:
        said = [Said(machine.stderr) for machine in machines]
        said[0].wait_for(READY)
        cluster.cut(1)
        assert [machine.wait(LIMIT) for machine in machines] == [1, 1]
        near, far = ([line for line in each.all() if line.startswith("expertmesh: ")] for each in said)
    assert len(near) == 3 and all(
        "rank 2 (node 1, card 0) on node1 does not answer any more in " in n for n in near
    )
    assert len(far) == 2 and all("it has not heard the driver for 5 s" in line for line in far)


@needs_a_cluster
@pytest.mark.parametrize("node", [0, 1])
def test_ctrl_c_on_one_machine(start: Start, node: int) -> None:
    process = start(*joined(2, 1, *LONG))
    err = Said(process.stderr)
    err.wait_for(READY)
    agent_of(process, node).send_signal(signal.SIGINT)
    code, out, said = ends(process, err)
    assert (code, out) == (130, "")
    told = "rank 1 (node 1, card 0) on node1 could not go on in step "
    assert len(said) == 3 * node and all(told in line and "SIGINT" in line for line in said)


@needs_a_cluster
def test_input_that_the_driver_refuses(start: Start) -> None:
    process = start(*joined(2, 1, *SHORT, "--exchange", "ring"))
    code, out, said = ends(process, err := Said(process.stderr))
    assert code in (1, 2) and out == "" and len(said) == 2, err.lines
    assert all("exchange 'ring' is not one of flat" in line for line in said)
    statuses = {line for line in err.lines if "ended with status" in line}
    assert statuses == {f"expertmesh: the program of node{n} ended with status {2 - n}" for n in range(2)}


@needs_a_cluster
def test_machines_that_do_not_find_each_other(start: Start, tmp_path: Path) -> None:
    (tmp_path / "roll.py").write_text(ROLL)
    process = start("--nodes", "3", "--", sys.executable, str(tmp_path / "roll.py"))
    out, err = process.communicate(timeout=LIMIT)
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for line in out.splitlines():
        host, _, rest = line.partition("] ")
        name, code, message = rest.split("|")
        found.setdefault(name, {})[int(host[-1])] = (code, message)
    hosts = "node0 (10.77.0.1), node1 (10.77.0.2), node2 (10.77.0.3)"
    for code, message in found["missing"].values():
        assert code == "1"
        assert message.startswith("expertmesh: 3 of 4 machines came to 10.77.0.1:29501 within 2 s: ")
        assert sorted(message.split(": ")[2].partition(";")[0].split(", ")) == hosts.split(", ")
        assert message.endswith("; start the same line on the others too")
    for node, (code, message) in found["nobody"].items():
        assert code == "1"
        assert message.startswith(f"expertmesh: node{node} cannot reach 10.77.0.9:29502 within 2 s: ")
    code, message = found["in use"].pop(0)
    assert code == "2" and "29503 on node0: Address already in use; take another" in message
    for code, message in found["in use"].values():
        assert code == "1" and "what listens there is not the store" in message
    for name, one, other in (("cards", 1, 2), ("nodes", 2, 3)):
        assert set(found[name].values()) == {
            (
                "2",
                f"expertmesh: --{name} is {one} on node0 (10.77.0.1) and {other} on node2 (10.77.0.3): start the same "
                "line on all machines",
            )
        }
    assert len(found) == 5 and len(found["cards"]) == 3 and err == "" and process.returncode == 0


def _second_interface(nodes: Sequence[Node]) -> None:
    """Joins two machines by another link, without the bridge."""
    one, other = nodes
    on(one, partial(configure, "ip", [f"link add eth1 type veth peer name eth1 netns {other.namespace}"]))
    for node in nodes:
        lines = [f"address add 10.78.0.{node.number + 1}/24 dev eth1", "link set eth1 up"]
        on(node, partial(configure, "ip", lines))


@needs_a_cluster
def test_the_interface_that_is_named(tmp_path: Path) -> None:
    """They meet at the address of one, and everything of ours takes the other."""
    with EmulatedCluster(2) as cluster:
        _second_interface(cluster.nodes)
        words = [*SHORT, "--nodes", "2", "--cards", "1", "--interface", "eth1"]
        with line_on_each(cluster, tmp_path, *words) as machines:
            found = [machine.communicate(timeout=LIMIT) for machine in machines]
            assert [machine.returncode for machine in machines] == [0, 0], found
    assert outputs(found[0][0]) == [TOKENS] and found[1] == ("", "")
    table = [line.split() for line in found[0][1].splitlines()[1:3]]
    assert [row[:4] for row in table] == [[f"{n}", f"node{n}", "eth1", f"10.78.0.{n + 1}"] for n in range(2)]


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        (["a", "--join", "h:1", "b"], ["a", "b"]),
        (["a", "--join=h:1", "b"], ["a", "b"]),
        (["--joi", "h:1", "--json"], ["--json"]),
        (["--", "a-p", "--json=join"], ["--", "a-p", "--json=join"]),
        ([], []),
    ],
)
def test_words_without_join(words: list[str], rest: list[str]) -> None:
    assert without_join(words) == rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--join", "10.0.0.1"], "--join '10.0.0.1': not of the form HOST:PORT"),
        (["--join", "10.0.0.1:0"], "not of the form HOST:PORT"),
        (["--join", "10.0.0.1:70000"], "not of the form HOST:PORT"),
        (["--join", "h:1"], "--join takes --nodes and --cards too"),
        (["--join", "h:1", "--nodes", "0", "--cards", "1"], "nodes is 0"),
        (["--join", "h:1", "--nodes", "2", "--cards", "1", "--timeout", "0"], "timeout is 0.0"),
        (["--join", "localhost:1", "--nodes", "2", "--cards", "1"], "--join localhost:1: for each machine that is"),
        (["--join", "127.0.0.1:1", "--nodes", "2", "--cards", "1"], "for each machine that is itself"),
        (["--join", "no-such-host.invalid:1", "--nodes", "2", "--cards", "1"], "has no address here"),
        (["--join", "127.0.0.1:1", "--nodes", "1", "--cards", "1", "--interface", "none9"], "no interface none9"),
        (["--interface", "none9"], "no interface none9"),
    ],
)  # fmt: skip
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", "-p", "x", *words])
    out, err = capsys.readouterr()
    assert (
        (code, out) == (2, "") and err.startswith("expertmesh: ") and err.count("\n") == 1 and message in err
    )
