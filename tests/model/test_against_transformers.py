"""The engine gives the logits and the greedy tokens of transformers, whatever the batch, the chunks, the cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh import SamplingParams
from tests.support.reference import TOLERANCE, VARIANTS, Pair, check_outputs, engine, greedy, prompts_for

LENGTHS = (1, 5, 33, 80)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk_1": {"chunk": 1, "page_size": 8},
    "chunk_7": {"chunk": 7, "page_size": 4},
    "chunk_64_no_prefix": {"chunk": 64, "page_size": 16, "prefix_cache": False},
    "narrow_steps": {"max_batch_tokens": 5, "max_batch_requests": 3, "page_size": 1},
}
PairOf = Callable[[str], Pair]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_batch(variant: str, pair_of: PairOf) -> None:
    pair = pair_of(variant)
    outputs = engine(pair).generate(
        prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, prompt=True)
    )
    check_outputs(pair, outputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_preemption_in_a_small_cache(variant: str, pair_of: PairOf) -> None:
    pair = pair_of(variant)
    llm = engine(pair, cache_tokens=240, page_size=4, chunk=16)
    outputs = llm.generate(prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary))
    assert llm.engine.scheduler.preemptions > 0
    check_outputs(pair, outputs)


@pytest.mark.parametrize(
    "variant", ["v3_eight_groups", "moonlight", "negative_bias", "odd_sizes", "v2", "v2_lite"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(variant: str, layout: str, pair_of: PairOf) -> None:
    pair = pair_of(variant)
    outputs = engine(pair, **LAYOUTS[layout]).generate(
        prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, prompt=layout != "narrow_steps")
    )
    check_outputs(pair, outputs)


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_chunks_with_preemption(chunk: int | None, pair_of: PairOf) -> None:
    """With prompt_logprobs: what was reported of a prompt must be reported once, however often it was computed."""
    pair = pair_of("v3_eight_groups")
    llm = engine(pair, chunk=chunk, cache_tokens=240, page_size=4)
    outputs = llm.generate(prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, prompt=True))
    assert llm.engine.scheduler.preemptions > 0
    assert [len(o.prompt_logprobs or ()) for o in outputs] == list(LENGTHS)
    check_outputs(pair, outputs)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("variant", ["v3_eight_groups", "v2"])
def test_shared_beginnings(variant: str, prefix_cache: bool, pair_of: PairOf) -> None:
    """Prompts that begin alike, and the outputs of earlier requests continued."""
    pair = pair_of(variant)
    llm = engine(pair, page_size=8, prefix_cache=prefix_cache)
    (common,) = prompts_for(pair.vocabulary, [40])
    prompts = [
        common[:n] + tail
        for n, tail in zip((40, 31, 8, 24), prompts_for(pair.vocabulary, (1, 9, 3, 16)), strict=True)
    ]
    first = llm.generate(prompts, greedy(pair.vocabulary, 24))
    grown = [o.prompt_token_ids + o.token_ids for o in first]
    again = llm.generate([*prompts, *grown], greedy(pair.vocabulary, 24))
    check_outputs(pair, [*first, *again])
    cached = [o.cached_tokens for o in again]
    # All full pages of what was computed, but never all of a prompt. The last token was never computed.
    full = [
        (min(len(p) - 1, len(g) - 1)) // 8 * 8
        for p, g in zip([*prompts, *grown], [*grown, *grown], strict=True)
    ]
    assert cached == (full if prefix_cache else [0] * 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_single_request(variant: str, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits themselves, not only up to a constant; one request alone in every step."""
    pair = pair_of(variant)
    llm = engine(pair)
    seen: list[Tensor] = []
    head = llm.engine.ranks.runners[0].model.head

    def recording(*args: Any) -> Tensor:
        seen.append(head(*args))
        return seen[-1]

    monkeypatch.setattr(llm.engine.ranks.runners[0].model, "head", recording)
    (prompt,) = prompts_for(pair.vocabulary, [12], seed=3)
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    expected, _ = pair.reference((prompt + output.token_ids)[:-1])
    torch.testing.assert_close(torch.cat(seen), expected[len(prompt) - 1 :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["v3_eight_groups", "kimi_k2", "v2"])
def test_tokens_of_transformers_own_generation(variant: str, pair_of: PairOf) -> None:
    """Its own loop and cache, rather than its logits on our tokens."""
    pair = pair_of(variant)
    (prompt,) = prompts_for(pair.vocabulary, [9], seed=5)
    (output,) = engine(pair).generate(prompt, SamplingParams(max_tokens=128, temperature=0, ignore_eos=True))
    expected = pair.reference.model.generate(
        torch.tensor([prompt]), max_new_tokens=128, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert prompt + output.token_ids == expected[0].tolist()
