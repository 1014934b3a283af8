"""Counters of the engine against what requests really did."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import LLM, SamplingParams
from expertmesh.engine.tally import QUEUE_BOUNDS, STEP_PARTS, Histogram

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_histogram_is_numpys(values: list[float]) -> None:
    found = Histogram(QUEUE_BOUNDS)
    for value in values:
        found.observe(value)
    assert found.cumulative == [int((np.array(values) <= bound).sum()) for bound in (*QUEUE_BOUNDS, np.inf)]
    assert found.sum == pytest.approx(sum(values))


def test_requests_and_tokens_are_counted(tiny_folder: str) -> None:
    llm = LLM(tiny_folder, page_size=4, max_batch_requests=2)
    outputs = llm.generate([list(range(2, 12)), [3, 4, 5], [5, 6]], GREEDY)
    tally = llm.engine.tally
    assert tally.submitted == 3 and tally.finished == {"length": 3}
    assert tally.prompt_tokens == sum(len(o.prompt_token_ids) for o in outputs) == 15
    assert tally.generated_tokens == sum(len(o.token_ids) for o in outputs) == 18
    assert tally.rows == 15 + 18 - 3  # nobody computes its last token
    assert sum(tally.queued.counts) == 3 and not tally.since
    assert tally.queued.sum == pytest.approx(sum(o.queued for o in outputs)) and all(
        o.queued > 0 for o in outputs
    )
    again = llm.generate([list(range(2, 12))], GREEDY)
    assert tally.cached_tokens == again[0].cached_tokens == 8


def test_what_is_aborted_is_counted_so(tiny_llm: LLM) -> None:
    engine = tiny_llm.engine
    before = engine.tally.finished["abort"]
    engine.submit([3, 4], GREEDY, "here")
    engine.submit([3, 4], GREEDY, "waits")
    assert {"here", "waits"} <= engine.tally.since.keys()
    engine.step()
    engine.abort("here")
    engine.abort("waits")
    assert engine.tally.finished["abort"] == before + 2 and not engine.tally.since


def test_a_scored_prompt_generates_nothing(tiny_llm: LLM) -> None:
    before = tiny_llm.engine.tally.generated_tokens
    tiny_llm.generate([[3, 4, 5]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert tiny_llm.engine.tally.generated_tokens == before


def test_every_part_of_a_step_has_its_time(tiny_llm: LLM) -> None:
    before, steps = dict(tiny_llm.engine.tally.seconds), tiny_llm.engine.tally.steps
    tiny_llm.generate([[3, 4, 5]], GREEDY)
    assert tiny_llm.engine.tally.steps == steps + GREEDY.max_tokens
    assert set(before) == set(STEP_PARTS)
    assert all(tiny_llm.engine.tally.seconds[part] > before[part] for part in STEP_PARTS)
