"""Ctrl-C at any moment: the engine goes on afterwards, and nothing is left running."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from expertmesh import LLM, RankFailure, SamplingParams, Topology
from expertmesh.engine.interrupts import held_back
from expertmesh.engine.ranks import ThreadRanks

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _interrupts_raise() -> Iterator[None]:
    """As Python has it, also where whoever started the tests ignores the signal, as shells do for background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_soon(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.parametrize(
    ("cluster", "ranks"), [((1, 1), "threads"), ((2, 4), "threads"), ((1, 2), "processes")], ids=str
)
def test_an_engine_goes_on_after_interrupts(tiny_folder: Path, cluster: tuple[int, int], ranks: str) -> None:
    delays = random.Random(1)
    with LLM(tiny_folder, topology=Topology(*cluster), ranks=ranks, prefix_cache=False) as llm:
        expected = llm.generate([[5, 6, 7], [8]], GREEDY)
        interrupted = 0
        for _ in range(15):
            timer = interrupt_soon(delays.uniform(0, 0.15))
            try:
                while timer.is_alive():
                    llm.generate([[9, 10], [11]], GREEDY)
                threading.Event().wait(1)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            assert not llm.engine.busy
        assert interrupted == 15
        again = llm.generate([[5, 6, 7], [8]], GREEDY)
        assert [o.token_ids for o in again] == [o.token_ids for o in expected]
        assert llm.engine.scheduler.pages_held == 0


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("rest")
    assert done == ["rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("rest")
    assert not done


def test_in_other_threads_there_is_nothing_to_hold_back() -> None:
    entered = []

    def run() -> None:
        with held_back():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]


def test_a_second_interrupt_in_a_step_ends_the_engine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows where its ranks are."""
    with LLM(tiny_folder, topology=Topology(1, 2)) as llm:
        ranks = llm.engine.ranks
        assert isinstance(ranks, ThreadRanks)

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ranks, "_done", SimpleNamespace(get=interrupted))
            llm.generate([[5]], GREEDY)
        with pytest.raises(RankFailure, match="interrupted in the middle of step 1"):
            llm.generate([[5]], GREEDY)
