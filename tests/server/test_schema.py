"""What is taken from a client, what is ignored, what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from expertmesh.server.schema import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p"} | fields)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": HELLO} | fields)


def test_sampling_fields_go_on_under_the_names_of_the_engine() -> None:
    given = {
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["a", "b"],
        "stop_token_ids": [4], "ignore_eos": True, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    none = {"logprobs": None, "prompt_logprobs": None}
    assert completion(**given).sampling() == given | none
    assert completion(stop="a").sampling()["stop"] == ["a"]
    assert completion(logprobs=2, echo=True).sampling()["prompt_logprobs"] == 2


def test_what_is_omitted_or_null_is_left_to_the_checkpoint() -> None:
    assert completion(temperature=None, user="u", best_of=1, n=None).sampling() == {
        "max_tokens": 16,
        "logprobs": None,
        "prompt_logprobs": None,
    }
    assert chat().sampling() == {"logprobs": None}


def test_chat_reports_and_lengths() -> None:
    assert chat(logprobs=True).sampling() == {"logprobs": 0}
    assert chat(logprobs=True, top_logprobs=4).sampling() == {"logprobs": 4}
    assert chat(max_tokens=5, max_completion_tokens=6).sampling()["max_tokens"] == 6


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([""], [""]),
    ],
)
def test_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, 1, [], {}, [1.5], [True], ["a", 1], [[1], "a"], "\ud800"])
def test_other_prompts_are_refused_in_one_sentence(prompt: Any) -> None:
    with pytest.raises(ValidationError, match="prompt must be a text") as info:
        completion(prompt=prompt)
    assert info.value.error_count() == 1


def test_forms_of_a_message() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "be brief", "name": "x"}, {"role": "user", "content": parts}]
    assert [m.plain() for m in chat(messages=messages).messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hel\nlo"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": "\ud800"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": ["x"]},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        "hello",
    ],
)
def test_other_messages_are_refused(message: Any) -> None:
    with pytest.raises(ValidationError):
        chat(messages=[message])
    with pytest.raises(ValidationError):
        chat(messages=[])


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}},
        {"suffix": "x"},
        {"best_of": 2},
        {"n": 2, "best_of": 3},
        {"functions": [{}]},
        {"structured_outputs": {"json": {}}},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(fields)[-1]):
        completion(**fields)


def test_what_asks_for_nothing_is_allowed() -> None:
    nothing: dict[str, Any] = {
        "tools": [],
        "logit_bias": {},
        "suffix": None,
        "response_format": {"type": "text"},
    }
    assert completion(**nothing, best_of=1, unheard_of=1).choices == 1


@pytest.mark.parametrize(
    "fields",
    [{"top_logprobs": 1}, {"logprobs": True, "top_logprobs": 21}, {"n": 0}, {"n": 129}, {"seed": 1 << 63}],
)
def test_bounds(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)
