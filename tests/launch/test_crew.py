"""The driver and its ranks: answers in order, and whoever fails, dies or falls silent is named, whatever others say."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from expertmesh.errors import RankFailure
from expertmesh.launch import crew as module
from expertmesh.launch.crew import Crew
from expertmesh.launch.duty import ENDED
from expertmesh.launch.forkserver import ForkServer
from expertmesh.launch.launcher import Here
from expertmesh.mesh.topology import Topology

pytestmark = pytest.mark.timeout(120)

LIMIT = 60.0  # seconds after which something hangs
OBEY = "tests.launch.programs:obey"
ECHO = {"do": "echo", "word": "x"}
Make = Callable[..., Crew]
DRIVER = """
import os, signal, sys, time
from expertmesh.launch.crew import Crew
from expertmesh.launch.launcher import Here
from expertmesh.mesh.topology import Topology
crew = Crew(Here(["expertmesh.launch.duty"]), "tests.launch.programs:obey", [{}] * 2, Topology(1, 2), 1.0)
crew.ask([{"do": "echo", "word": 1}] * 2)
print(*(member.pid for member in crew.members), flush=True)
sys.stdin.readline()
print(len(crew.ask([{"do": "echo", "word": 2}] * 2)), flush=True)
crew.close()
"""


class Apart(Here):
    """As if the ranks were on other machines."""

    apart = True


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(["expertmesh.launch.duty"]) as found:
        yield found


@pytest.fixture
def make(server: ForkServer) -> Iterator[Make]:
    with ExitStack() as stack:

        def call(nodes: int, cards: int, timeout: float = LIMIT, apart: bool = False, **spec: Any) -> Crew:
            topology = Topology(nodes, cards)
            launcher = (Apart if apart else Here)((), server)
            crew = Crew(launcher, OBEY, [spec] * topology.ranks, topology, timeout)
            stack.callback(crew.close)
            return crew

        yield call


def wait_until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


def ended(crew: Crew) -> bool:
    return all(member.wait(LIMIT) is not None for member in crew.members)


def failure(crew: Crew, messages: list[dict[str, Any]], during: str = "step 7") -> str:
    """Why this cannot be answered: all ranks have ended then, and the next question is answered the same."""
    with pytest.raises(RankFailure) as caught:
        crew.ask(messages, during)
    assert ended(crew)
    with pytest.raises(RankFailure, match=re.escape(str(caught.value))):
        crew.ask([ECHO] * len(messages))
    host = socket.gethostname()
    return str(caught.value).replace(f" on {host}", "").replace("; all ranks have been stopped", "")


def test_answers_come_in_the_order_of_the_ranks(make: Make) -> None:
    crew = make(2, 2)
    for turn in range(20):
        after = 0.1 if turn == 3 else 0.0
        messages = [ECHO | {"word": [turn, rank], "after": after * (4 - rank)} for rank in range(4)]
        assert crew.ask(messages) == [
            [f"rank {rank} (node {rank // 2}, card {rank % 2})", [turn, rank]] for rank in range(4)
        ]


def test_a_rank_that_raises_is_named(make: Make) -> None:
    crew = make(1, 3)
    broken = {"do": "raise", "word": "broken"}
    assert (
        failure(crew, [ECHO, broken, ECHO]) == "rank 1 (node 0, card 1) failed in step 7: ValueError: broken"
    )
    assert {member.wait(0) for member in crew.members} == {ENDED}


def test_an_answer_that_cannot_be_said_is_a_failure(make: Make) -> None:
    assert "rank 1 (node 0, card 1) failed in step 7: TypeError: can not serialize" in failure(
        make(1, 2), [ECHO, {"do": "unsayable"}]
    )


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ({"do": "exit", "status": 5}, "died in step 7: it exited with status 5, process "),
        ({"do": "raise", "word": "broken"}, "failed in step 7: ValueError: broken"),
    ],
    ids=["exits", "raises"],
)
def test_the_cause_is_named_and_not_who_has_seen_it(
    end: dict[str, Any], how: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others speak first, and suspect each other."""
    monkeypatch.setattr(module, "GRACE", 1.0)
    seen = {"do": "witness", "word": "waits in vain"}
    messages = [seen | {"suspects": s} for s in ([2], [0, 2], [], [])]
    messages[2] = end | {"after": 0.3}
    assert failure(make(2, 2), messages).startswith(f"rank 2 (node 1, card 0) {how}")


def test_a_rank_that_the_others_wait_for_in_vain_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.3)
    seen = {"do": "witness", "word": "waits in vain", "suspects": [2, 0]}
    assert failure(make(1, 3), [seen, seen | {"after": 0.1}, ECHO | {"after": 60}]) == (
        "rank 2 (node 0, card 2) has been computing step 7 for so long that the others gave up "
        "(rank 0 waits in vain)"
    )


def test_where_all_suspect_each_other_the_first_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.3)
    seen = [
        {"do": "witness", "word": f"is {rank}", "suspects": [1 - rank], "after": rank / 10} for rank in (0, 1)
    ]
    assert failure(make(1, 2), seen) == "rank 0 (node 0, card 0) could not go on in step 7: is 0"


def test_a_rank_that_is_asked_for_more_after_it_has_failed_waits_for_its_end(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 1.0)
    crew = make(1, 2)
    crew.members[0].channel.send({"do": "witness", "word": "was told to end", "suspects": []})
    said = failure(crew, [ECHO, ECHO | {"after": 60}])
    assert said == "rank 0 (node 0, card 0) could not go on in step 7: was told to end"


@pytest.mark.parametrize("when", ["idle", "asked"])
@pytest.mark.parametrize(
    ("cluster", "stopped", "more"),
    [
        ((2, 2), [2], ""),
        ((2, 2), [2, 3], ", nor does any other rank of its node: its link is cut or the machine is down"),
        ((2, 1), [1], ": its link is cut or the machine is down"),
        ((1, 2), [0, 1], ""),
    ],
    ids=str,
)
def test_silent_ranks(
    cluster: tuple[int, int],
    stopped: list[int],
    more: str,
    when: str,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is stopped is named; of a node that is silent as a whole, that is said."""
    monkeypatch.setattr(module, "GRACE", 0.3)
    crew, told = make(*cluster, timeout=1.0, apart=True), threading.Event()
    count = len(crew.members)
    crew.on_failure(lambda _: told.set())
    crew.ask([ECHO] * count, "step 7")
    for rank in stopped:
        os.kill(crew.members[rank].pid, signal.SIGSTOP)
    if when == "idle":
        assert told.wait(LIMIT)
    said = failure(crew, [ECHO] * count)
    rank = stopped[0]
    assert said == (
        f"rank {rank} (node {rank // cluster[1]}, card {rank % cluster[1]}) does not answer any more in step 7, "
        f"for 1 s now{more}"
    )
    assert told.wait(LIMIT)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (signal.SIGSTOP, "does not answer any more in step 7"),
        (signal.SIGKILL, "died in step 7: killed by signal 9 (SIGKILL)"),
        (40, "died in step 7: killed by signal 40"),  # a real-time signal: it has no name
    ],
)
def test_a_rank_that_ends_in_the_middle_of_an_answer(
    end: int, how: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.3)
    crew = make(1, 2, timeout=1.0)
    assert failure(crew, [ECHO, {"do": "half", "end": end}]) == (
        f"rank 1 (node 0, card 1) {how}, process {crew.members[1].pid}"
    )


def test_while_a_rank_is_in_the_middle_of_an_answer_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They hear why all end, and do not leave before because they hear nothing."""
    monkeypatch.setattr(module, "GRACE", 0.3)
    with ForkServer(["expertmesh.launch.duty"]) as server:
        crew = Crew(Apart((), server), OBEY, [{}] * 2, Topology(1, 2), 4.0)
        crew.ask([ECHO] * 2)
        said = failure(crew, [ECHO, {"do": "half", "end": signal.SIGSTOP}])
        crew.close()
    assert said.startswith("rank 1 (node 0, card 1) does not answer any more in step 7, process ")
    assert re.findall(" ends: (.*)", capfd.readouterr().err) == [crew.failure]


def test_what_nobody_expects_of_a_rank_ends_all(make: Make) -> None:
    crew, told = make(1, 2), threading.Event()
    crew.on_failure(lambda _: told.set())
    said = failure(crew, [ECHO, {"do": "nonsense", "word": 5}])
    assert said.startswith("the driver cannot go on in step 7: TypeError: ") and told.wait(LIMIT)


def test_a_rank_that_dies_while_nothing_is_asked(make: Make) -> None:
    """Who wants to know is told at once, may close the crew, and hears it also when he comes later."""
    crew, told, heard = make(1, 2), threading.Event(), list[str]()

    def close(why: str) -> None:
        heard.append(why)
        crew.close()
        told.set()

    crew.on_failure(close)
    os.kill(crew.members[1].pid, signal.SIGKILL)
    assert told.wait(LIMIT) and ended(crew)
    crew.close()
    crew.on_failure(heard.append)
    assert len(heard) == 2 and heard[0] == heard[1]
    assert re.fullmatch(
        r"rank 1 \(node 0, card 1\) on \S+ died in the start: killed by signal 9 \(SIGKILL\), process \d+; "
        "all ranks have been stopped",
        heard[0],
    )


def test_closing_is_no_failure(make: Make) -> None:
    crew, heard = make(1, 2), list[str]()
    crew.on_failure(heard.append)
    for _ in range(2):
        crew.close()
    assert [member.wait(0) for member in crew.members] == [0, 0] and not heard
    with pytest.raises(RankFailure, match="the engine is closed"):
        crew.ask([ECHO] * 2)


def test_closing_while_something_is_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 1.0)
    crew, said = make(1, 2), list[str]()

    def ask() -> None:
        with pytest.raises(RankFailure) as caught:
            crew.ask([ECHO | {"after": 60}] * 2)
        said.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    crew.close()
    thread.join(LIMIT)
    assert said == ["the engine is closed"] and ended(crew)


def test_an_interrupt_while_something_is_asked(make: Make) -> None:
    crew = make(1, 2)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        crew.ask([ECHO | {"after": 60}] * 2, "step 7")
    timer.join()
    assert ended(crew)
    with pytest.raises(RankFailure, match=r"the engine was broken off in step 7: KeyboardInterrupt\(\)"):
        crew.ask([ECHO] * 2)


def test_where_ranks_stand(make: Make, tmp_path: Path) -> None:
    """Also while they compute; of one that is stopped, that it does not answer."""
    crew, end = make(2, 2), tmp_path / "end"
    thread = threading.Thread(target=crew.ask, args=([ECHO | {"until": str(end)}] * 4, "step 7"))
    thread.start()
    try:
        wait_until(lambda: all("time.sleep" in text for text in crew.stands()))
        os.kill(crew.members[2].pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(crew.members[2].pid).status() == psutil.STATUS_STOPPED)
        said = crew.stands()
    finally:
        os.kill(crew.members[2].pid, signal.SIGCONT)
        end.touch()
        thread.join(LIMIT)
    for rank, (text, member) in enumerate(zip(said, crew.members, strict=True)):
        name = f"rank {rank} (node {rank // 2}, card {rank % 2}) on {socket.gethostname()}"
        assert text.startswith(f"{name}, process {member.pid}, step 7: ")
        assert (f"does not answer within {module.DUMP:g} s" in text) == (rank == 2)
        assert ("computes (echo)\n" in text and "time.sleep" in text) == (rank != 2)
    wait_until(lambda: ["waits for the driver" in text for text in crew.stands()] == [True] * 4)


def test_what_a_rank_waits_for(make: Make) -> None:
    crew = make(1, 1, waits="waits for rank 5")
    crew.ask([ECHO])
    assert ": waits for rank 5\n" in crew.stands()[0]


@pytest.mark.parametrize(("silence", "status"), [(0.5, ENDED), (None, None)])
def test_a_rank_without_a_driver(silence: float | None, status: int | None, server: ForkServer) -> None:
    """It ends when it has not heard it for long, and at once when the connection ends."""
    spec = {"name": "rank 0", "speaks": False, "silence": silence}
    process, other = server.start(OBEY, [spec] * 2)
    for _ in range(8):  # one that hears it lives
        other.channel.send({"do": "ping"})
        assert other.channel.receive() == {"pong": "idle"}
        time.sleep(0.2)
    assert process.wait(LIMIT if silence else 0) == status
    assert other.poll() is None
    other.channel.close()
    assert other.wait(LIMIT) == ENDED
    process.kill()


def test_a_driver_that_is_stopped_for_a_while_goes_on() -> None:
    """That it has heard nobody meanwhile is its own doing."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        driver.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        driver.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "2\n" and driver.wait(LIMIT) == 0
