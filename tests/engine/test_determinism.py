"""Greedy, what a request gets is the same in every bit, whatever runs beside it and however its prompt is cut."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import LLM, Output, SamplingParams
from expertmesh.request import TAIL, Batch, Request, Slice
from tests.kernels.test_ops import NATIVE

PROMPTS = [[5 + (7 * n + 3 * i) % 900 for i in range(n)] for n in (300, 1, 2, TAIL, TAIL + 1, 40, 333)]
PARAMS = [SamplingParams(max_tokens=20 + i, temperature=0, logprobs=2) for i in range(len(PROMPTS))]


def said(outputs: list[Output]) -> list[Any]:
    return [(output.token_ids, output.logprobs) for output in outputs]


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize("quantise", ["none", "w8a8"])
def test_greedy_outputs_have_the_same_bits_under_any_load(quantise: str) -> None:
    shared: dict[str, Any] = {"dtype": "bfloat16", "quantise": quantise, "page_size": 16}
    with LLM(prefix_cache=False, max_batch_requests=1, **shared) as llm:
        alone = said(llm.generate(PROMPTS, PARAMS))
    ways: list[dict[str, Any]] = [
        {},
        {"chunk": 1, "max_batch_requests": 3},
        {"chunk": 7},
        {"max_batch_tokens": 65, "max_batch_requests": 64},
        # So few pages that requests give way to others, and are computed again.
        {"cache_tokens": 448, "max_context": 400, "prefix_cache": False},
    ]
    for way in ways:
        with LLM(**shared, **way) as llm:
            assert said(llm.generate(PROMPTS, PARAMS)) == alone, way
            # What was found in the cache is what was computed.
            assert said(llm.generate(PROMPTS, PARAMS)) == alone, way
            assert ("cache_tokens" in way) == bool(llm.engine.scheduler.preemptions)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with LLM(**shared) as llm:
            assert said(llm.generate(PROMPTS, PARAMS)) == alone
    finally:
        torch.set_num_threads(before)


@given(st.integers(1, 60), st.integers(0, 20), st.data())
@settings(max_examples=50)
def test_how_a_row_is_computed_depends_on_its_place_alone(
    prompt: int, more: int, data: st.DataObject
) -> None:
    request = Request("r", [1] * (prompt + more), prompt, SamplingParams(), 0)
    ends = sorted(data.draw(st.sets(st.integers(1, prompt + more), max_size=9)) | {prompt + more})
    slices = [Slice(request, start, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    latent = [p for s in slices for p in range(s.start + s.count - s.tail, s.start + s.count)]
    assert latent == list(range(max(0, prompt - TAIL), prompt + more))
    assert [s.decodes for s in Batch.of(slices).slices] == sorted((s.decodes for s in slices), reverse=True)
