"""Times of a rank's parts: all of a step's time, and nothing that the model computes is changed by measuring."""

import time

import torch

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm.alone import Alone
from expertmesh.engine.parts import EVERY, RANK_PARTS, Parts, Timed

PARAMS = SamplingParams(max_tokens=2 * EVERY, temperature=0, ignore_eos=True)


def test_one_step_of_some_is_measured() -> None:
    parts, plain = Parts(), Alone()
    measured = [isinstance(parts.of_step(plain, 1), Timed) for _ in range(3 * EVERY)]
    assert measured == 3 * ([False] * (EVERY - 1) + [True])


def test_micro_batches_are_not_measured() -> None:
    """But the next step that is in one piece."""
    parts, plain = Parts(), Alone()
    assert all(parts.of_step(plain, 2) is plain for _ in range(2 * EVERY))
    assert isinstance(parts.of_step(plain, 1), Timed)


def test_parts_are_told_apart() -> None:
    """A program that sleeps where a model would compute: each sleep is in its part, and all together are the whole."""
    parts = Parts()
    timed, nothing = Timed(Alone(), parts), torch.zeros(1, 1)

    def program() -> None:
        time.sleep(0.02)
        received = timed.exchange.dispatch(0, nothing, nothing, nothing)
        time.sleep(0.04)
        timed.exchange.combine(nothing, received)
        time.sleep(0.02)

    begin = time.perf_counter()
    timed.run([program])
    taken = time.perf_counter() - begin
    assert parts.steps == 1
    assert parts.seconds["attention"] >= 0.04 and parts.seconds["experts"] >= 0.04
    assert 0.08 <= sum(parts.seconds.values()) <= taken


def test_all_ranks_measure_the_same_steps() -> None:
    with LLM(topology=Topology(1, 2), cache_tokens=256, overlap="off") as llm:
        llm.generate(["Once upon a time"], PARAMS)
        found = llm.engine.ranks.parts()
        assert [steps for steps, _ in found] == [2, 2]
        for _, seconds in found:
            assert set(seconds) == set(RANK_PARTS) and min(seconds.values()) > 0
            assert sum(seconds.values()) < llm.engine.tally.seconds["ranks"]
        llm.engine.ranks.reset()
        assert [steps for steps, _ in llm.engine.ranks.parts()] == [0, 0]


def test_a_rank_alone_has_nothing_to_tell() -> None:
    with LLM(cache_tokens=256) as llm:
        llm.generate(["Once upon a time"], PARAMS)
        assert llm.engine.ranks.parts() == []
