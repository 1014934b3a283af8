"""Ranks as processes: the same tokens, and what happens when one of them fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.engine.plan import Plan
from expertmesh.engine.processes import PRELOAD, ProcessRanks
from expertmesh.errors import RankFailure
from expertmesh.launch.duty import ENDED
from expertmesh.launch.forkserver import ForkServer
from expertmesh.launch.launcher import Here
from tests.support.files import TINY, random_checkpoint
from tests.support.reference import Pair, check_outputs, engine, greedy, prompts_for

PairOf = Callable[[str], Pair]
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer(PRELOAD) as server:
        yield server


@pytest.fixture
def llm(tiny_folder: Path, fork_server: ForkServer) -> Iterator[LLM]:
    """Two nodes of two cards, whose collectives wait 60 s."""
    topology = Topology(2, 2, 2)
    with LLM(
        tiny_folder, topology=topology, ranks="processes", timeout=60, launcher=Here(PRELOAD, fork_server)
    ) as llm:
        yield llm


def pids(llm: LLM) -> list[int]:
    found = llm.engine.ranks.pids
    assert len(found) == llm.engine.layout.topology.ranks
    return found


def wait_until_gone(processes: list[int]) -> None:
    for _ in range(600):
        left = [
            p
            for p in processes
            if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
        ]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {left}")


@pytest.mark.parametrize("exchange", ["flat", "two_tier"])
@pytest.mark.parametrize("cluster", [(1, 2, 2), (2, 2, 1), (2, 3, 1), (2, 4, 4)], ids=str)
def test_processes_give_the_reference_tokens(
    cluster: tuple[int, int, int], exchange: str, pair_of: PairOf, fork_server: ForkServer
) -> None:
    pair = pair_of("v3_eight_groups")
    options = {
        "topology": Topology(*cluster),
        "exchange": exchange,
        "redundant": cluster[1] - 1,
        "page_size": 8,
    }
    with engine(
        pair, ranks="processes", cache_tokens=240, launcher=Here(PRELOAD, fork_server), **options
    ) as llm:
        outputs = llm.generate(
            prompts_for(pair.vocabulary, (1, 5, 33, 80)), greedy(pair.vocabulary, 24, prompt=True)
        )
        check_outputs(pair, outputs)


def test_64_processes_give_the_tokens_of_one_rank(fork_server: ForkServer) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    prompts = ["Once upon a time", "class Stack:\n"]
    alone = LLM(dtype="float32").generate(prompts, params)
    with LLM(
        dtype="float32", topology=Topology(8, 8), ranks="processes", launcher=Here(PRELOAD, fork_server)
    ) as llm:
        assert len(set(pids(llm))) == 64
        assert [o.token_ids for o in llm.generate(prompts, params)] == [o.token_ids for o in alone]


def test_threads_and_processes_give_the_same_bits_and_send_the_same_bytes(
    pair_of: PairOf, fork_server: ForkServer
) -> None:
    pair = pair_of("v3_eight_groups")
    found = []
    for ranks in ("threads", "processes"):
        with engine(
            pair, topology=Topology(2, 4, 2), ranks=ranks, launcher=Here(PRELOAD, fork_server)
        ) as llm:
            outputs = llm.generate(prompts_for(pair.vocabulary, (3, 20, 7)), greedy(pair.vocabulary, 8))
            sent = [
                ({k: v.tolist() for k, v in s.bytes.items()}, {k: v.tolist() for k, v in s.messages.items()})
                for s in llm.engine.ranks.sent()
            ]
            loads = {layer: rows.tolist() for layer, rows in llm.engine.ranks.loads().items()}
            found.append(([(o.token_ids, o.logprobs) for o in outputs], sent, loads))
            llm.engine.ranks.reset()
            assert not any(rows.any() for rows in llm.engine.ranks.loads().values())
    assert found[0] == found[1]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_is_named_and_all_end(rank: int, llm: LLM) -> None:
    processes = pids(llm)
    stream = llm.stream([[5, 6, 7]], LONG)
    next(stream)
    os.kill(processes[rank], signal.SIGKILL)
    with pytest.raises(
        RankFailure,
        match=rf"rank {rank} \(node {rank // 2}, card {rank % 2}\) on \S+ died in step \d+: "
        rf"killed by signal 9 \(SIGKILL\), process {processes[rank]}; all ranks",
    ):
        list(stream)
    wait_until_gone(processes)
    with pytest.raises(RankFailure, match=f"rank {rank} "):  # and again
        llm.generate([[5]], LONG)


def test_a_rank_killed_while_idle_is_named_at_the_next_step(llm: LLM) -> None:
    llm.generate([[5, 6]], SamplingParams(max_tokens=2))
    processes = pids(llm)
    os.kill(processes[2], signal.SIGKILL)
    wait_until_gone(processes[2:3])
    with pytest.raises(RankFailure, match=r"rank 2 .* killed by signal 9"):
        llm.generate([[5]], LONG)
    wait_until_gone(processes)


def test_a_rank_that_raises_is_named_with_what_it_raised(llm: LLM) -> None:
    ranks, processes = llm.engine.ranks, pids(llm)
    assert isinstance(ranks, ProcessRanks)
    step = {"do": "step", "batch": {"ended": [], "slices": []}, "plan": asdict(Plan(1, 1, "even", 0))}
    with pytest.raises(
        RankFailure, match=r"rank 1 \(node 0, card 1\) .* failed in .*ValueError: no such message: nonsense"
    ):
        ranks.crew.ask([step, {"do": "nonsense"}, step, step])
    wait_until_gone(processes)
    assert {m.wait(0) for m in ranks.crew.members} == {ENDED}


def test_a_stopped_rank_is_named_when_it_has_not_answered_for_long(
    tiny_folder: Path, fork_server: ForkServer
) -> None:
    topology = Topology(2, 2, 2)
    with LLM(
        tiny_folder, topology=topology, ranks="processes", timeout=2, launcher=Here(PRELOAD, fork_server)
    ) as llm:
        processes = pids(llm)
        os.kill(processes[1], signal.SIGSTOP)
        with pytest.raises(RankFailure, match=r"rank 1 .* does not answer any more in step 1, for 2 s now"):
            llm.generate([[5]], LONG)
        wait_until_gone(processes)


def test_ranks_end_with_a_driver_that_is_killed(tiny_folder: Path) -> None:
    program = (
        "import sys\nfrom expertmesh import LLM, Topology\n"
        "llm = LLM(sys.argv[1], topology=Topology(1, 2), ranks='processes')\n"
        "print(*llm.engine.ranks.pids, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tiny_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        processes = [int(p) for p in driver.stdout.readline().split()]
        assert len(processes) == 2
        processes.append(psutil.Process(processes[0]).ppid())  # their server
        driver.kill()
    wait_until_gone(processes)


def test_closing_leaves_no_process(llm: LLM) -> None:
    processes = pids(llm)
    llm.close()
    llm.close()
    wait_until_gone(processes)
    with pytest.raises(RankFailure, match="the engine is closed"):
        llm.generate([[5]], LONG)


def test_a_rank_that_computes_for_longer_than_the_timeout_has_not_failed(
    tiny_folder: Path, fork_server: ForkServer
) -> None:
    """One rank comes late to a collective in which the other one waits for it."""
    topology = Topology(2, 1, 1)
    with LLM(
        tiny_folder, topology=topology, ranks="processes", timeout=1, launcher=Here(PRELOAD, fork_server)
    ) as llm:
        ranks = llm.engine.ranks
        assert isinstance(ranks, ProcessRanks)
        step = {"do": "step", "batch": {"ended": [], "slices": []}, "plan": asdict(Plan(1, 1, "even", 0))}
        ranks.crew.members[1].channel.send(step)
        time.sleep(3)
        assert len(ranks.crew.ask([step, {"do": "loads"}])) == 2


@pytest.mark.parametrize(
    "changes", [{"n_routed_experts": 0, "n_shared_experts": 0}, {"first_k_dense_replace": 2}]
)
@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_a_model_without_expert_layers(
    changes: dict[str, int], ranks: str, tmp_path: Path, fork_server: ForkServer
) -> None:
    random_checkpoint(tmp_path, TINY | changes)
    expected = LLM(tmp_path).generate([[5, 6, 7]], SHORT)[0].token_ids
    with LLM(tmp_path, topology=Topology(2, 2, 2), ranks=ranks, launcher=Here(PRELOAD, fork_server)) as llm:
        assert llm.generate([[5, 6, 7]], SHORT)[0].token_ids == expected
        assert llm.engine.ranks.loads() == {}


def test_parameters_of_any_size_harm_nobody(llm: LLM) -> None:
    large = 10**25
    odd = SamplingParams(
        max_tokens=large, temperature=large, top_k=large, seed=1 << 70, stop_token_ids=(large, *range(280))
    )
    (output,) = llm.generate([[5, 6]], odd)
    assert output.finish_reason == "stop" and len(llm.generate([[5]], SHORT)[0].token_ids) == 4


def test_a_rank_that_does_not_read_is_named(tiny_folder: Path, fork_server: ForkServer) -> None:
    """A message larger than the socket's buffers, to a rank that is stopped."""
    with LLM(
        tiny_folder,
        topology=Topology(1, 2),
        ranks="processes",
        timeout=1,
        launcher=Here(PRELOAD, fork_server),
    ) as llm:
        ranks, processes = llm.engine.ranks, pids(llm)
        assert isinstance(ranks, ProcessRanks)
        os.kill(processes[1], signal.SIGSTOP)
        with pytest.raises(RankFailure, match=r"rank 1 .* does not answer any more"):
            ranks.crew.ask([{"do": "reset", "padding": bytes(20_000_000)}] * 2)
        wait_until_gone(processes)
