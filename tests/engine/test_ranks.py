"""Ranks as threads: failures, memory."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh import LLM, InputError, SamplingParams, Topology
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.errors import RankFailure
from tests.support.files import official_config, write_sparse


def test_a_rank_that_raises_is_named_and_ends_the_engine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_folder, topology=Topology(2, 2, 2)) as llm:
        ranks = llm.engine.ranks
        assert isinstance(ranks, ThreadRanks)

        def broken(*_: Any) -> None:
            raise ValueError("out of order")

        monkeypatch.setattr(ranks.runners[2].model.layers[1][1], "kernels", broken)
        message = r"rank 2 \(node 1, card 0\) on \S+ failed in step 1: "
        for _ in range(2):
            with pytest.raises(RankFailure, match=message):
                llm.generate([[5, 6]], SamplingParams(max_tokens=2))


def test_threads_end_with_their_engine(tiny_folder: Path) -> None:
    before = threading.active_count()
    llm = LLM(tiny_folder, topology=Topology(2, 4))
    llm.generate([[5, 6]], SamplingParams(max_tokens=2))
    threads = [t for t in threading.enumerate() if t.name.startswith("rank ")]
    assert len(threads) >= 8
    llm.close()
    for thread in threads:
        thread.join(30)
    assert threading.active_count() <= before


def test_threads_share_what_is_the_same(tiny_folder: Path) -> None:
    with LLM(tiny_folder, topology=Topology(2, 2, 2)) as llm:
        ranks = llm.engine.ranks
        assert isinstance(ranks, ThreadRanks)
        first, second, third, _ = (r.model for r in ranks.runners)
        assert first.embedding.weight is third.embedding.weight  # the same TP rank of two groups
        assert first.embedding.weight is not second.embedding.weight
        assert first.layers[0][0].a is second.layers[0][0].a
        distinct = {t.data_ptr(): t for m in (first, second, third) for t in m.weights().values()}
        assert ranks.memory.together < 4 * ranks.memory.weights
        assert len(distinct) < 3 * len(first.weights())


def test_more_ranks_than_memory_are_refused_before_anything_starts(tmp_path: Path) -> None:
    write_sparse(tmp_path, official_config("deepseek-v2-lite"), 2)
    with pytest.raises(InputError, match=r"its weights take .* GB in memory"):
        LLM(tmp_path, topology=Topology(8, 8), ranks="processes")


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        (Topology(2, 3, 3), {}, "attention_tp 3 does not divide num_attention_heads 4"),
        (Topology(2, 2), {"exchange": "ring"}, "exchange 'ring' is not one of flat"),
        (Topology(2, 2), {"ranks": "fibers"}, "ranks 'fibers' is not one of auto, threads, processes"),
        (Topology(2, 2), {"redundant": 100}, "100 redundant slots"),
        (Topology(2, 2), {"redundant": -1}, "redundant is -1"),
        (Topology(2, 2), {"timeout": 0}, "timeout is 0"),
        (Topology(2, 2), {"timeout": 1e10}, "timeout is 1"),
        (Topology(40, 40), {}, "1600 ranks on one machine"),
    ],
)
def test_bad_input(tiny_folder: Path, topology: Topology, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LLM(tiny_folder, topology=topology, **options)


def test_a_rank_that_hangs_is_named_when_the_others_give_up(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.engine.ranks.PATIENCE", 1)
    monkeypatch.setattr("expertmesh.engine.ranks.GRACE", 0.5)
    with LLM(tiny_folder, topology=Topology(2, 2, 1), timeout=0.5) as llm:
        ranks, go = llm.engine.ranks, threading.Event()
        assert isinstance(ranks, ThreadRanks)
        run = ranks.runners[3].run

        def hang(*work: Any) -> Any:
            ranks._world.turn.release()
            go.wait(60)
            ranks._world.turn.acquire()
            return run(*work)

        monkeypatch.setattr(ranks.runners[3], "run", hang)
        with pytest.raises(RankFailure, match=r"rank 3 .* has been computing step 1 for so long"):
            llm.generate([[5, 6]], SamplingParams(max_tokens=2))
        go.set()


def test_other_threads_keep_their_number_of_threads(tiny_folder: Path) -> None:
    torch.set_num_threads(2)
    try:
        with LLM(tiny_folder, topology=Topology(2, 2)) as llm:
            llm.generate([[5]], SamplingParams(max_tokens=2))
            found: list[int] = []
            thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert found == [2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_program_that_closes_nothing_ends_well(tiny_folder: Path) -> None:
    """Threads that still ran while the interpreter ends would abort the process."""
    program = (
        "import sys\nfrom expertmesh import LLM, SamplingParams, Topology\n"
        "llm = LLM(sys.argv[1], topology=Topology(2, 4))\n"
        "print(llm.generate([5, 6], SamplingParams(max_tokens=2))[0].finish_reason)\n"
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tiny_folder)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.strip()) == (0, "length"), done.stderr
