"""What is taken from a client, what is ignored, what is refused."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from expertmesh import InputError
from expertmesh.server.openai.schema import ChatRequest, CompletionRequest

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
        {"role": "assistant", "content": None},
        {"role": "tool", "content": None, "tool_call_id": "1"},
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
        {"suffix": "x"},
        {"best_of": 2},
        {"n": 2, "best_of": 3},
        {"tools": [{}]},
        {"use_beam_search": True},
        {"stream_options": {"include_usage": True}},
        {"logit_bias": {"a": 1}},
        {"guided_json": {}, "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
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
    }
    assert completion(**nothing, best_of=1, unheard_of=1).choices == 1
    assert chat(response_format={"type": "text"}, audio=None, functions=[]).asked().constraint is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_JSON = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "json_object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            AS_JSON,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, {"type": "json_object"}),
        ({"guided_json": SCHEMA}, AS_JSON),
        ({"guided_json": json.dumps(SCHEMA)}, AS_JSON),
        ({"guided_regex": "a+"}, {"type": "regex", "pattern": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"type": "choice", "choices": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"type": "ebnf", "grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"json": SCHEMA}}, AS_JSON),
        ({"structured_outputs": {"json_object": True}}, {"type": "json_object"}),
        (
            {"structured_outputs": {"structural_tag": {"format": {}}}},
            {"type": "structural_tag", "format": {}},
        ),
    ],
)
def test_formats_become_constraints(fields: dict[str, Any], constraint: dict[str, Any]) -> None:
    assert chat(**fields).asked().constraint == constraint


TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": SCHEMA, "description": "d", "strict": True},
    },
    {"type": "function", "function": {"name": "now"}},
]


def test_tools_and_which_of_them() -> None:
    turn = chat(tools=TOOLS, parallel_tool_calls=False).turn()
    look, now = turn.tools
    assert (look.name, look.parameters, look.description, look.strict) == ("look", SCHEMA, "d", True)
    assert now.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert (turn.choice, turn.only, turn.parallel, list(turn.callable)) == ("auto", None, False, [look, now])
    named: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
    turn = chat(tools=TOOLS, tool_choice=named).turn()
    assert (turn.choice, list(turn.shown), list(turn.callable)) == ("required", [look, now], [now])
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    turn = chat(tools=TOOLS, tool_choice=allowed).turn()
    assert (turn.choice, list(turn.callable)) == ("auto", [now])
    turn = chat(tools=TOOLS, tool_choice="none").turn()
    assert (list(turn.shown), list(turn.callable)) == ([], [])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x'"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "array",
        ),
    ],
)
def test_tools_that_cannot_be_called(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        chat(**fields).turn()


def test_how_much_to_reason_is_for_the_template() -> None:
    assert chat().turn().variables == {}
    assert chat(reasoning_effort="high").turn().variables["thinking"] is True
    off = chat(reasoning_effort="none", chat_template_kwargs={"x": 1}).turn().variables
    assert off == {"reasoning_effort": "none", "thinking": False, "enable_thinking": False, "x": 1}


def test_a_conversation_with_calls_goes_on_as_it_is() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [call]}
    result = {"role": "tool", "content": "1", "tool_call_id": "c"}
    assert chat(messages=[*HELLO, said, result]).turn().messages == [*HELLO, said, result]


def test_numbers_that_are_texts_are_no_numbers() -> None:
    with pytest.raises(ValidationError, match="temperature"):
        chat(temperature="1")


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 1},
        {"continue_final_message": True},
        {"logprobs": True, "top_logprobs": 21},
        {"n": 0},
        {"n": 129},
        {"seed": 1 << 63},
    ],
)
def test_bounds(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": [1, 1]},
        {"messages": [1, 1]},
        {"bad_words": [1, 1]},
        {"logit_bias": {"a": 1, "b": 1}},
        {"logit_bias": {"1": "a", "2": "b"}},
        {"tools": [{}, {}]},
    ],
)
def test_the_first_of_many_errors_is_the_only_one(fields: dict[str, Any]) -> None:
    """All of them, for a body as large as it may be, would hold up whoever else is served for many seconds."""
    with pytest.raises(ValidationError) as info:
        chat(**fields)
    assert info.value.error_count() <= 2  # one for each form that an item may have
