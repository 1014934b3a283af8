"""Steps that are run again give what computing them anew gives."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from expertmesh import LLM, Output, SamplingParams
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.engine.runner import Runner
from tests.kernels.test_ops import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
PROMPTS = [list(range(5 + n, 5 + 2 * n)) for n in (1, 3, 40, 17, 2)]
PARAMS = [SamplingParams(max_tokens=6 + 3 * i, temperature=0, logprobs=1) for i in range(len(PROMPTS))]


@contextmanager
def demo(**options: Any) -> Iterator[tuple[LLM, Runner]]:
    """Without a prefix cache: what is found there is computed by another op than what is not."""
    with LLM(dtype="bfloat16", prefix_cache=False, **options) as llm:
        assert isinstance(llm.engine.ranks, ThreadRanks)
        yield llm, llm.engine.ranks.runners[0]


def said(outputs: list[Output]) -> list[Any]:
    return [(output.token_ids, output.logprobs) for output in outputs]


@pytest.fixture(scope="module", params=["none", "w8a8"])
def anew(request: pytest.FixtureRequest) -> tuple[str, list[Any]]:
    """How weights are kept, and what comes out without tapes."""
    with demo(quantise=request.param) as (llm, runner):
        runner.replay = None
        return request.param, said(llm.generate(PROMPTS, PARAMS))


def test_requests_that_come_and_go_in_the_middle(anew: tuple[str, list[Any]]) -> None:
    """Pages of requests that were aborted serve others, in another order."""
    quantise, expected = anew
    with demo(quantise=quantise, cache_tokens=160, max_context=160, page_size=16) as (llm, runner):
        for _ in range(2):
            others = [llm.engine.submit([9] * 20, SamplingParams(max_tokens=50)) for _ in range(2)]
            for _ in range(4):
                llm.engine.step()
            for other in others:
                llm.engine.abort(other.id)
            assert said(llm.generate(PROMPTS, PARAMS)) == expected
        assert runner.replay is not None and runner.replay._recorded


def test_other_threads_and_other_engines(anew: tuple[str, list[Any]]) -> None:
    """In a thread that did not record, beside another engine, and by another number of threads."""
    quantise, expected = anew
    before = torch.get_num_threads()
    with demo(quantise=quantise) as (first, _), demo(quantise=quantise, max_batch_requests=1) as (second, _):
        assert said(first.generate(PROMPTS, PARAMS)) == expected
        found: dict[LLM, list[Any]] = {}

        def run(llm: LLM) -> None:
            found[llm] = said(llm.generate(PROMPTS, PARAMS))

        threads = [threading.Thread(target=run, args=(llm,)) for llm in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {first: expected, second: expected}
        try:
            torch.set_num_threads(3)
            assert said(first.generate(PROMPTS, PARAMS)) == expected
        finally:
            torch.set_num_threads(before)


def test_loads_are_counted_again(anew: tuple[str, list[Any]]) -> None:
    with demo(quantise=anew[0]) as (llm, _):
        llm.generate(PROMPTS, PARAMS)
        once = llm.engine.ranks.loads()
        llm.engine.ranks.reset()
        llm.generate(PROMPTS, PARAMS)
        again = llm.engine.ranks.loads()
        assert once.keys() == again.keys() and all(torch.equal(once[layer], again[layer]) for layer in once)
