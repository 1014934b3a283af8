"""Edits of logits, of many requests at once, against a slow version of one token after the other."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh import SamplingParams
from expertmesh.engine.edits import apply_edits
from expertmesh.engine.sampler import sample
from expertmesh.request import Limits, Request

NEVER = -math.inf
NONE = Limits()


def request_of(
    name: str = "r", output: list[int] | None = None, limits: Limits = NONE, **params: Any
) -> Request:
    return Request(name, [0, *(output or [])], 1, SamplingParams(**params), 0, limits=limits)


def mask_of(tokens: list[int], size: int) -> np.ndarray:
    """Bit t % 32 of word t // 32."""
    words = [0] * -(-size // 32)
    for token in tokens:
        words[token // 32] |= 1 << token % 32
    return np.array(words, dtype=np.uint32).view(np.int32)


def slowly(row: list[float], request: Request, mask: list[int] | None) -> list[float]:
    """Bias; then what forbids, one after the other, each where it leaves something."""
    limits, output = request.limits, request.tokens[request.prompt_length :]
    row = [x + (request.params.logit_bias or {}).get(token, 0.0) for token, x in enumerate(row)]
    may = set(range(len(row))) if mask is None else set(mask)
    early = {token for count, tokens in limits.early if len(output) < count for token in tokens}
    bad = {w[-1] for w in limits.bad_words if output[len(output) - len(w) + 1 :] == list(w[:-1])}
    may = (may & set(limits.allowed) if limits.allowed else may) or may
    for banned in (early, bad):
        may = may - banned or may
    return [x if token in may else NEVER for token, x in enumerate(row)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[Request], list[list[int] | None]]:
    size = draw(st.sampled_from([1, 7, 8, 9, 31, 32, 33, 64, 75]))
    token = st.integers(0, size - 1)
    some = st.lists(token, min_size=1, max_size=size).map(tuple)
    requests, masks = [], []
    for number in range(draw(st.integers(0, 4))):
        limits = Limits(
            draw(st.just(()) | some),
            tuple(draw(st.lists(st.tuples(st.integers(1, 4), some), max_size=2))),
            tuple(draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=3))),
        )
        bias = draw(st.none() | st.dictionaries(token, st.floats(-100, 100, width=32), max_size=4))
        output = draw(st.lists(st.integers(0, min(size, 3) - 1), max_size=5))
        requests.append(request_of(str(number), output, limits, logit_bias=bias))
        masks.append(draw(st.none() | st.lists(token, min_size=1, unique=True)))
    numbers = draw(st.integers(0, 99))
    return torch.randn(len(requests), size, generator=torch.Generator().manual_seed(numbers)), requests, masks


@given(batches())
def test_edits_are_those_of_the_slow_version(
    case: tuple[Tensor, list[Request], list[list[int] | None]],
) -> None:
    logits, requests, masks = case
    before, size = logits.clone(), logits.shape[1]
    words = {r.id: mask_of(m, size) for r, m in zip(requests, masks, strict=True) if m is not None}
    found = apply_edits(logits, requests, words)
    assert torch.equal(logits, before), "logprobs are of the model's own logits"
    for row, request, mask, given_row in zip(found, requests, masks, logits, strict=True):
        expected = slowly(given_row.tolist(), request, mask)
        np.testing.assert_allclose(row.numpy(), np.array(expected, dtype=np.float32), rtol=1e-5, atol=1e-5)
        assert row.isfinite().any()


def test_without_edits_nothing_is_copied() -> None:
    logits = torch.randn(3, 50)
    assert apply_edits(logits, [request_of(str(i), top_p=0.5) for i in range(3)], {}) is logits


def test_a_bias_of_100_forces_and_of_minus_100_bans() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 3
    for seed in range(20):
        request = Request("r", [0], 1, SamplingParams(logit_bias={7: 100}), seed)
        assert sample(logits, [request])[0].token == 7
        request = Request("r", [0], 1, SamplingParams(logit_bias=dict.fromkeys(range(39), -100)), seed)
        assert sample(logits, [request])[0].token == 39


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}, {"temperature": 0}], ids=str
)
def test_only_tokens_of_the_mask_are_chosen(cut: dict[str, Any]) -> None:
    logits = torch.randn(1, 75, generator=torch.Generator().manual_seed(2))
    tokens = [int(logits.argmin()), 40, 74]
    for seed in range(30):
        request = Request("r", [0], 1, SamplingParams(**cut), seed)
        assert sample(logits, [request], {"r": mask_of(tokens, 75)})[0].token in tokens


def test_greedy_takes_the_lowest_id_of_equal_ones_that_may_come() -> None:
    requests = [request_of(temperature=0)]
    assert sample(torch.zeros(1, 75), requests, {"r": mask_of([70, 41, 66], 75)})[0].token == 41


def test_logprobs_are_the_models_own_under_every_edit() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    limits = Limits(early=((5, (int(logits.argmax()),)),))
    request = request_of(limits=limits, temperature=0, logprobs=2, logit_bias={3: 50})
    (found,) = sample(logits, [request], {"r": mask_of([3, 4], 40)})
    own = logits.log_softmax(-1)[0]
    assert found.token == 3 and found.logprobs is not None and int(logits.argmax()) in found.logprobs
    for token, value in found.logprobs.items():
        assert value == pytest.approx(float(own[token]), abs=1e-5)
