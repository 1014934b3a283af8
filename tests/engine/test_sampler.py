"""Choosing tokens: transformers' logits processors say which tokens survive and how likely each is, numpy computes
logarithms, and nothing in a batch changes what another request gets."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expertmesh import SamplingParams
from expertmesh.engine import sampler
from expertmesh.engine.edits import apply_edits
from expertmesh.engine.sampler import fold_seed, sample, top_logprobs, uniform
from expertmesh.request import Request, Sampled

GRID = 1000
LARGEST = torch.finfo(torch.float32).max


def request_of(
    *, seed: int = 0, prompt: Sequence[int] = (0,), output: Sequence[int] = (), **params: Any
) -> Request:
    tokens = [*prompt, *output]
    return Request("r", tokens, len(prompt), SamplingParams(**params), seed)


def normal(rows: int, vocabulary: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def on_a_grid(logits_V: Tensor, request: Request) -> np.ndarray:
    """How often each token is drawn by GRID evenly spaced numbers: its probability, to 1 / GRID."""
    requests = [Request("r", request.tokens, request.prompt_length, request.params, i) for i in range(GRID)]
    with mock.patch.object(sampler, "uniform", lambda seed, position: (seed + 0.5) / GRID):
        sampled = sample(logits_V.expand(GRID, -1), requests)
    return np.bincount([s.token for s in sampled], minlength=len(logits_V)) / GRID


def transformers_distribution(logits_V: Tensor, request: Request) -> np.ndarray:
    """Processors in the order of `generate`."""
    p, chain = request.params, LogitsProcessorList()
    chain.append(TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k:
        chain.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        chain.append(MinPLogitsWarper(p.min_p))
    ids: Any = torch.tensor([request.tokens])
    scores = chain(ids, logits_V.double().unsqueeze(0))
    found: np.ndarray = scores.softmax(dim=-1)[0].numpy()
    return found


def same_distribution(drawn: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(drawn - expected).max() <= 1.01 / GRID
    assert not drawn[expected == 0].any(), "a token that was dropped"
    assert drawn[expected > 1.01 / GRID].all(), "a token that must survive"


def chi_square(counts: np.ndarray, expected: np.ndarray) -> None:
    """Five standard deviations of the statistic, so that only a wrong distribution fails."""
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5 + 5


# Distinct numbers, since which of two equal ones is dropped is nobody's business.
distinct_logits = st.lists(st.integers(-300, 300), min_size=1, max_size=20, unique=True).map(
    lambda numbers: torch.tensor(numbers) / 100
)
cuts = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(0, 6) | st.just(25),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
    },
)
temperatures = st.floats(0.05, 20)


@given(distinct_logits, temperatures, cuts)
def test_distribution_is_that_of_transformers(
    logits: Tensor, temperature: float, cut: dict[str, Any]
) -> None:
    request = request_of(temperature=temperature, **cut)
    same_distribution(on_a_grid(logits, request), transformers_distribution(logits, request))


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({"top_k": 3}, 3),
        ({"top_p": 0.6}, 5),
        ({"min_p": 0.2}, 9),
        ({"top_k": 6, "top_p": 0.7}, 3),  # of all tokens it would take 7 to hold as much
        ({"top_p": 0.7, "min_p": 0.4}, 4),
        ({"top_k": 6, "top_p": 0.9, "min_p": 0.5}, 3),
    ],
    ids=str,
)
def test_cuts_drop_tokens_one_after_the_other(cut: dict[str, Any], left: int) -> None:
    logits = normal(1, 20, seed=1)[0]
    expected = transformers_distribution(logits, request_of(**cut))
    assert np.count_nonzero(expected) == left
    same_distribution(on_a_grid(logits, request_of(**cut)), expected)


def test_penalties_come_before_temperature_and_cuts() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2, -0.3])
    request = request_of(
        output=[0, 0, 1, 3], temperature=2.0, top_k=4, presence_penalty=1, frequency_penalty=0.4
    )
    subtracted = torch.tensor([1.8, 1.4, 0.0, 1.4, 0.0, 0.0])
    plain = request_of(temperature=2.0, top_k=4)
    same_distribution(on_a_grid(logits, request), transformers_distribution(logits - subtracted, plain))


@st.composite
def penalised(draw: st.DrawFn) -> tuple[Tensor, list[Request]]:
    vocabulary = draw(st.integers(1, 12))
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=15)
    requests = [
        request_of(
            prompt=[0, *draw(ids)],
            output=draw(ids),
            repetition_penalty=draw(st.just(1.0) | st.floats(0.1, 10)),
            presence_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
            frequency_penalty=draw(st.just(0.0) | st.floats(-2, 2)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    return normal(len(requests), vocabulary, draw(st.integers(0, 99)), scale=3), requests


@given(penalised())
def test_penalties(case: tuple[Tensor, list[Request]]) -> None:
    """Repetition against transformers; then OpenAI: mu[j] -= c[j] * alpha_frequency + (c[j] > 0) * alpha_presence,
    where c counts how often a token was sampled before."""
    logits, requests = case
    before = logits.clone()
    after = apply_edits(logits, requests, {})
    assert torch.equal(logits, before), "logprobs are of the model's own logits"
    for row, request, found in zip(logits, requests, after, strict=True):
        p = request.params
        processor = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)
        mu = processor(torch.tensor([request.tokens]), row.double().unsqueeze(0))[0].numpy()
        for j in range(len(mu)):
            c = request.tokens[request.prompt_length :].count(j)
            mu[j] -= c * p.frequency_penalty + (c > 0) * p.presence_penalty
        np.testing.assert_allclose(found.numpy(), mu, rtol=1e-5, atol=1e-5)


def test_penalties_decide_what_greedy_takes() -> None:
    logits = torch.tensor([[1.0, 1.5, 1.9, -9.0]])
    cases: list[tuple[dict[str, Any], list[int], int]] = [
        ({}, [2], 2),
        ({"presence_penalty": 1.0}, [2, 2], 1),
        ({"presence_penalty": 0.3}, [2, 2, 2], 2),
        ({"frequency_penalty": 0.3}, [2, 2, 2], 1),
        ({"repetition_penalty": 1.3}, [2], 1),
    ]
    for params, output, token in cases:
        assert sample(logits, [request_of(output=output, temperature=0, **params)]) == [Sampled(token)]
    # Of the prompt only repetition takes notice.
    openai = request_of(prompt=[2, 2, 2], temperature=0, presence_penalty=2, frequency_penalty=2)
    ctrl = request_of(prompt=[2, 2, 2], temperature=0, repetition_penalty=1.3)
    assert sample(logits.repeat(2, 1), [openai, ctrl]) == [Sampled(2), Sampled(1)]


@given(st.integers(1, 40), st.integers(0, 999), cuts)
def test_greedy_is_argmax(vocabulary: int, seed: int, cut: dict[str, Any]) -> None:
    logits = normal(5, vocabulary, seed)
    sampled = sample(logits, [request_of(seed=i, temperature=0, **cut) for i in range(5)])
    assert [s.token for s in sampled] == logits.numpy().argmax(axis=-1).tolist()


@st.composite
def any_requests(draw: st.DrawFn, vocabulary: int = 9) -> Request:
    changes = draw(cuts) | {
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "logprobs": draw(st.none() | st.integers(0, 3)),
        "presence_penalty": draw(st.sampled_from([0.0, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.5])),
    }
    ids = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=5)
    return request_of(seed=draw(st.integers(-9, 9)), prompt=draw(ids), output=draw(ids), **changes)


@given(st.lists(st.tuples(any_requests(), st.integers(0, 99)), max_size=8), st.randoms(use_true_random=False))
def test_nothing_else_in_the_batch_changes_a_request(batch: list[tuple[Request, int]], order: Any) -> None:
    rows = [normal(1, 9, seed, scale=2) for _, seed in batch]
    alone = [sample(row, [request])[0] for row, (request, _) in zip(rows, batch, strict=True)]
    places = list(range(len(batch)))
    order.shuffle(places)
    for some in (places, places[: len(places) // 2]):
        logits = torch.cat([rows[i] for i in some]) if some else torch.empty(0, 9)
        assert sample(logits, [batch[i][0] for i in some]) == [alone[i] for i in some]


@given(
    st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 8), min_size=2, max_size=30), cuts, st.data()
)
def test_a_token_depends_on_seed_and_position_alone(
    seed: int, tokens: list[int], cut: dict[str, Any], data: st.DataObject
) -> None:
    """Neither on which tokens came before, nor on which of them were the prompt, nor on the request's history."""
    others = data.draw(st.lists(st.integers(0, 8), min_size=len(tokens), max_size=len(tokens)))
    one = request_of(seed=seed, prompt=tokens, **cut)
    other = request_of(seed=seed, prompt=others[:1], output=others[1:], **cut)
    other.id, other.arrival, other.computed, other.preemptions = "other", 7, 3, 2
    logits = normal(1, 9, seed=len(tokens))
    assert sample(logits, [one]) == sample(logits, [other])


def test_seeds_and_positions_give_different_tokens() -> None:
    logits = torch.zeros(1, 1000)
    by_seed = [sample(logits, [request_of(seed=i)])[0].token for i in range(50)]
    by_position = [sample(logits, [request_of(output=[0] * i)])[0].token for i in range(50)]
    assert len(set(by_seed)) > 40 and len(set(by_position)) > 40


@given(st.integers(), st.integers(0, 2**40))
def test_uniform_is_from_0_to_below_1_for_every_seed(seed: int, position: int) -> None:
    folded = fold_seed(seed)
    assert (folded - seed) % 2**64 == 0 and -(2**63) <= folded < 2**63
    u = uniform(folded, position)
    assert 0 <= u < 1 and u == uniform(folded, position)


@pytest.mark.parametrize("along", ["seeds", "positions", "both"])
def test_uniform_is_uniform_and_neighbours_are_independent(along: str) -> None:
    pairs = [(i if along != "positions" else 42, i if along != "seeds" else 17) for i in range(10_000)]
    u = np.array([uniform(*pair) for pair in pairs])
    chi_square(np.histogram(u, 100, (0, 1))[0], np.full(100, 100.0))
    squares = np.histogram2d(u[:-1], u[1:], 10, ((0, 1), (0, 1)))[0]
    chi_square(squares.ravel(), np.full(100, 99.99))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 5},
    ],
    ids=str,
)
def test_frequencies_over_many_seeds(params: dict[str, Any]) -> None:
    logits, count = torch.tensor([0.3, -1.2, 1.1, 0.0, 0.9, -0.4, -2.0, 0.6]), 10_000
    requests = [request_of(seed=i, prompt=[0] * 5, **params) for i in range(count)]
    counts = np.bincount(sampler.draw(logits.expand(count, -1), requests).numpy(), minlength=8)
    chi_square(counts, count * transformers_distribution(logits, requests[0]))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}])
def test_smallest_and_largest_number_take_possible_tokens(u: float, cut: dict[str, Any]) -> None:
    logits = torch.tensor([[-LARGEST, 0.1, -LARGEST, 0.0, -LARGEST]])
    with mock.patch.object(sampler, "uniform", lambda seed, position: u):
        assert sampler.draw(logits, [request_of(**cut)]).tolist() == [1 if u == 0 else 3]


EXTREME = {
    "all_0": torch.zeros(7),
    "all_huge": torch.full((7,), LARGEST),
    "all_hugely_negative": torch.full((7,), -LARGEST),
    "one_dominates": torch.tensor([0.0, 1.0, 2.0, 1e6, -1.0, -2.0, -3.0]),
    "one_is_huge": torch.tensor([0.0, 1.0, 2.0, LARGEST, -1.0, -2.0, -3.0]),
    "both_ends": torch.tensor([LARGEST, -LARGEST, 0.0, 1.0, LARGEST, -LARGEST, 0.0]),
    "tiny": torch.tensor([1e-38, -1e-38, 0.0, 1e-45, 2e-38, 0.0, -0.0]),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0, 1e3])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 2}, {"top_p": 1e-9}, {"top_p": 0.999}, {"min_p": 1.0}], ids=str
)
def test_extreme_logits(name: str, temperature: float, cut: dict[str, Any]) -> None:
    logits = EXTREME[name]
    tokens = {
        s.token
        for s in sample(
            logits.expand(50, -1), [request_of(seed=i, temperature=temperature, **cut) for i in range(50)]
        )
    }
    assert tokens <= set(range(7))
    if name in ("one_dominates", "one_is_huge", "both_ends"):
        assert tokens <= set((logits == logits.max()).nonzero().flatten().tolist())
    if name.startswith("all") and temperature and cut in ({}, {"top_p": 0.999}, {"min_p": 1.0}):
        assert tokens == set(range(7))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e30, LARGEST])
@pytest.mark.parametrize("temperature", [1e-9, 1.0, 1e3])
def test_equal_logits_are_equally_likely(value: float, temperature: float) -> None:
    drawn = on_a_grid(torch.full((8,), value), request_of(temperature=temperature))
    same_distribution(drawn, np.full(8, 1 / 8))


def test_lowest_temperature_takes_the_most_likely() -> None:
    logits = normal(200, 50, seed=3)
    drawn = sampler.draw(logits, [request_of(seed=i, temperature=1e-9) for i in range(200)])
    assert drawn.tolist() == logits.numpy().argmax(axis=-1).tolist()


def test_highest_temperature_makes_all_nearly_equal() -> None:
    logits = normal(1, 10, seed=3)[0]
    drawn = on_a_grid(logits, request_of(temperature=1e3))
    same_distribution(drawn, transformers_distribution(logits, request_of(temperature=1e3)))
    assert drawn.min() > 0.099


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_repetition_penalties(penalty: float, temperature: float) -> None:
    """They forbid or force what was said already, and never make a number that is none."""
    logits = torch.tensor([[2.0, -1.0, 0.0, 1.0]])
    for seed in range(20):
        request = request_of(
            seed=seed, prompt=[0, 1], temperature=temperature, repetition_penalty=penalty, presence_penalty=1
        )
        assert apply_edits(logits, [request], {}).isfinite().all()
        # Dividing by a huge number leaves a logit of 0, multiplying a negative one forbids it.
        assert sample(logits, [request])[0].token in ({0} if penalty < 1 else {0, 2, 3})


@given(any_requests(vocabulary=1), st.sampled_from([-LARGEST, -1.0, 0.0, 1.0, LARGEST]))
def test_vocabulary_of_1(request: Request, logit: float) -> None:
    (sampled,) = sample(torch.tensor([[logit]]), [request])
    assert sampled == Sampled(0, None if request.params.logprobs is None else {0: 0.0})


def test_no_requests() -> None:
    assert sample(torch.empty(0, 5), []) == []


def log_softmax(logits_V: Tensor) -> np.ndarray:
    x = logits_V.double().numpy()
    x = x - x.max()
    found: np.ndarray = x - np.log(np.exp(x).sum())
    return found


def check_report(found: dict[int, float] | None, logits_V: Tensor, chosen: int, count: int) -> None:
    """The `count` most likely tokens and the chosen one, most likely first. The logits are distinct."""
    assert found is not None
    expected = log_softmax(logits_V)
    order = np.argsort(-expected).tolist()
    assert list(found) == [i for rank, i in enumerate(order) if rank < count or i == chosen]
    np.testing.assert_allclose(list(found.values()), expected[list(found)], rtol=1e-5, atol=1e-5)


@st.composite
def reports(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    rows, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    logits = normal(
        rows, vocabulary, draw(st.integers(0, 999)), scale=draw(st.sampled_from([0.1, 3.0, 50.0]))
    )
    chosen = draw(st.lists(st.integers(0, vocabulary - 1), min_size=rows, max_size=rows))
    return logits, chosen, draw(st.lists(st.integers(0, 35), min_size=rows, max_size=rows))


@given(reports())
def test_logprobs_are_the_most_likely_and_the_chosen(case: tuple[Tensor, list[int], list[int]]) -> None:
    found = top_logprobs(*case)
    for report, row, chosen, count in zip(found, *case, strict=True):
        check_report(report, row, chosen, count)


def test_logprobs_are_the_models_own_whatever_chose_the_token() -> None:
    logits = normal(40, 12, seed=5, scale=2)
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 3.0},
        {"top_k": 1},
        {"temperature": 0, "presence_penalty": 2, "repetition_penalty": 4},
    ]
    requests = [
        request_of(seed=i, output=[int(row.argmax())], logprobs=i % 5, **ways[i % 4])
        for i, row in enumerate(logits)
    ]
    for i, (sampled, row) in enumerate(zip(sample(logits, requests), logits, strict=True)):
        check_report(sampled.logprobs, row, sampled.token, i % 5)


def test_logprobs_only_where_asked_for() -> None:
    logits = normal(3, 12)
    sampled = sample(logits, [request_of(), request_of(logprobs=0), request_of(logprobs=2)])
    lengths = [None if s.logprobs is None else len(s.logprobs) for s in sampled]
    assert lengths in ([None, 1, 2], [None, 1, 3])


def test_equal_logits_are_reported_by_lowest_id_whatever_else_is_in_the_batch() -> None:
    logits = torch.zeros(2, 100)
    logits[:, [7, 50, 90]] = 2.0
    few, many = (request_of(temperature=0, logprobs=n) for n in (2, 5))
    alone, beside = sample(logits[:1], [few])[0], sample(logits, [few, many])[0]
    assert alone == beside and list(alone.logprobs or ()) == [7, 50] and alone.token == 7


def test_the_lowest_temperatures_tell_close_logits_apart() -> None:
    logits = torch.tensor([[1.0, 1.0000001]])
    tokens = {sample(logits, [request_of(temperature=1e-9, seed=s)])[0].token for s in range(50)}
    assert tokens == {1}
