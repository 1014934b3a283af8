"""Sampling parameters: what is wrong is named before anything runs, what is right is kept as it is."""

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, SamplingParams

# Lowest and highest value that is allowed.
WHOLE = {"max_tokens": 0, "top_k": 0, "logprobs": 0, "prompt_logprobs": 0}
RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, math.inf),
}
NOT_ZERO = {"top_p", "repetition_penalty"}
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "1", "", [1], 1j, b"1"]


def refused(name: str, value: object) -> None:
    """One sentence that begins with the field's name."""
    fields: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=rf"^{name}\b"):
        SamplingParams(**fields)


def kept(name: str, value: object) -> None:
    fields: dict[str, Any] = {name: value}
    assert getattr(SamplingParams(**fields), name) == value


def test_defaults_are_the_models_own_distribution() -> None:
    p = SamplingParams()
    assert (p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1, 0, 0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0, 0, 1)
    assert (p.seed, p.stop, p.stop_token_ids, p.logprobs, p.prompt_logprobs) == (None, (), (), None, None)
    assert not p.ignore_eos


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", [*WHOLE, *RANGES])
def test_no_number(name: str, value: object) -> None:
    refused(name, value)


@pytest.mark.parametrize("name", [n for n in (*WHOLE, *RANGES) if "logprobs" not in n])
def test_none_where_a_number_is_needed(name: str) -> None:
    refused(name, None)


@pytest.mark.parametrize("name", WHOLE)
@given(value=st.integers(-(10**12), 10**12))
def test_whole_numbers(name: str, value: int) -> None:
    if value >= WHOLE[name]:
        kept(name, value)
    elif (name, value) != ("top_k", -1):
        refused(name, value)


@pytest.mark.parametrize("name", WHOLE)
@given(value=st.floats())
def test_fractions_where_a_whole_number_is_needed(name: str, value: float) -> None:
    if (name, value) != ("top_k", -1):
        refused(name, value)


@pytest.mark.parametrize("name", RANGES)
@given(value=st.floats(-3, 3) | st.floats())
def test_numbers_out_of_range(name: str, value: float) -> None:
    low, high = RANGES[name]
    good = math.isfinite(value) and low <= value <= high and not (value == 0 and name in NOT_ZERO)
    (kept if good else refused)(name, value)


@pytest.mark.parametrize("name", RANGES)
def test_ends_of_the_range(name: str) -> None:
    low, high = RANGES[name]
    (refused if name in NOT_ZERO else kept)(name, int(low))
    refused(name, math.nextafter(low, -math.inf))
    if high == math.inf:
        kept(name, 1e300)
    else:
        kept(name, int(high))
        refused(name, math.nextafter(high, math.inf))


def test_top_k_of_minus_1_keeps_every_token_as_in_vllm() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    refused("top_k", -2)


@given(st.integers())
def test_any_whole_number_is_a_seed(seed: int) -> None:
    kept("seed", seed)


@pytest.mark.parametrize("seed", [1.0, math.nan, math.inf, True, False, "1", [1]])
def test_other_seeds(seed: object) -> None:
    refused("seed", seed)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


@given(st.text(min_size=1))
def test_stop_as_one_text(text: str) -> None:
    assert params(stop=text).stop == params(stop=[text]).stop == (text,)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
@pytest.mark.parametrize("nothing", [None, [], ()])
def test_nothing_to_stop_at(name: str, nothing: object) -> None:
    assert getattr(params(**{name: nothing}), name) == ()


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], [None], [b"a"], ["a", ["b"]], b"a"])
def test_stop_is_texts(stop: object) -> None:
    refused("stop", stop)


@pytest.mark.parametrize("ids", [[-1], [3, -1], [1.0], [math.nan], ["1"], "12", [None], [[1]]])
def test_stop_token_ids_are_ids(ids: object) -> None:
    refused("stop_token_ids", ids)


def test_lists_become_tuples_so_that_nobody_can_change_them() -> None:
    stop, ids = ["a", "b"], [3, 0]
    p = params(stop=stop, stop_token_ids=ids)
    stop.append("c")
    ids.append(4)
    assert (p.stop, p.stop_token_ids) == (("a", "b"), (3, 0))
    assert len({p, params(stop=("a", "b"), stop_token_ids=(3, 0))}) == 1
    with pytest.raises(FrozenInstanceError):
        p.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 10**400), ("temperature", 10**400), ("stop", 5), ("stop", 0), ("stop", True),
        ("stop_token_ids", 5), ("stop_token_ids", 0), ("stop_token_ids", [True]), ("stop_token_ids", "12"),
        ("ignore_eos", "no"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{name} "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {1: 100.1}), ("logit_bias", {1: -101}), ("logit_bias", {1: math.nan}), ("logit_bias", {1: "5"}),
        ("logit_bias", {"1": 5}), ("logit_bias", {-1: 5}), ("logit_bias", {True: 5}), ("logit_bias", [(1, 5)]),
        ("min_tokens", -1), ("min_tokens", 1.5), ("min_tokens", 129), ("min_tokens", True),
        ("allowed_token_ids", []), ("allowed_token_ids", [-1]), ("allowed_token_ids", ["a"]), ("allowed_token_ids", 5),
        ("bad_words", [""]), ("bad_words", [" "]), ("bad_words", [5]), ("bad_words", "word"), ("bad_words", ["\ud800"]),
        ("grammar", 5), ("grammar", {"type": "json_object"}), ("grammar", ""), ("grammar", "{"), ("grammar", "[1]"),
        ("grammar", '{"type": "xml"}'), ("grammar", '{"type": ["regex"]}'), ("grammar", '{"type": "json_schema"}'),
        ("grammar", '{"type": "json_schema", "schema": "{}"}'), ("grammar", '{"type": "regex", "pattern": 5}'),
        ("grammar", '{"type": "regex"}'), ("grammar", '{"type": "ebnf"}'), ("grammar", '{"type": "structural_tag"}'),
        ("grammar", '{"type": "choice", "choices": []}'), ("grammar", '{"type": "choice", "choices": ["a", ""]}'),
        ("grammar", '{"type": "choice", "choices": ["\\ud800"]}'),
        ("grammar", json.dumps({"type": "choice", "choices": [str(i) for i in range(5000)]})),
        ("grammar", '{"type": "json_object", "after": ""}'), ("grammar", '{"type": "json_object", "after": 5}'),
        ("grammar", "[" * 100_000),
        ("grammar", '{"type": "json_schema", "schema": {"const": "\\ud800"}}'),
        ("grammar", '{"type": "regex", "pattern": "\ud800"}'),
        ("grammar", '{"type": "structural_tag", "format": ' + '{"a": [' * 128 + "]}" * 128 + "}"),
        ("grammar", json.dumps({"type": "regex", "pattern": "a" * (1 << 17)})),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_constraints_that_are_wrong(name: str, value: object) -> None:
    refused(name, value)


def test_a_grammar_as_deep_as_may_be() -> None:
    inside = '{"a": [' * 127 + '{"a": 1}' + "]}" * 127
    kept("grammar", f'{{"type": "structural_tag", "format": {inside}}}')


def test_constraints_that_are_right() -> None:
    for bias in ({}, {0: -100, 9: 100}, {5: 0.5}):
        kept("logit_bias", bias)
    kept("min_tokens", 128)
    kept("grammar", '{"type": "json_schema", "schema": true, "after": "</think>"}')
    p = SamplingParams(allowed_token_ids=[3, 4], bad_words=["a", "b c"])  # type: ignore[arg-type]
    assert p.allowed_token_ids == (3, 4) and p.bad_words == ("a", "b c")


def test_a_bias_does_not_change_with_what_it_was_made_of() -> None:
    bias = {1: 2.0}
    p = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert p.logit_bias == {1: 2.0} and p == SamplingParams(logit_bias={1: 2}) and isinstance(hash(p), int)
