"""Chat completions as the official client reads them: reasoning, calls of tools, formats."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from expertmesh.engine.markup import DEEPSEEK_V31
from tests.server.conftest import NAME, connect
from tests.server.scripted import ScriptedWorker

ASK: list[Any] = [{"role": "user", "content": "Is it raining?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Looks.", "parameters": PARAMETERS},
}
PARIS, OSLO = ("weather", '{"city": "Paris"}'), ("weather", '{"city": "Oslo 🙂"}')
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
THINKING = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture
def client(script_url: str) -> Iterator[OpenAI]:
    with connect(script_url) as found:
        yield found


def talk(client: OpenAI, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"model": NAME, "messages": ASK, "max_tokens": 300}
    return client.chat.completions.create(**(defaults | fields))


def streamed(client: OpenAI, **fields: Any) -> Any:
    """The first choice, put together by the client's own stream helper."""
    defaults: dict[str, Any] = {"model": NAME, "messages": ASK, "max_tokens": 300}
    with client.chat.completions.stream(**(defaults | fields)) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0]


def told(choice: Any) -> tuple[Any, ...]:
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return getattr(message, "reasoning_content", None), message.content or None, calls, choice.finish_reason


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("Yes.", {}, (None, "Yes.", [], "stop")),
        ("hm</think>Yes.", {"extra_body": THINKING}, ("hm", "Yes.", [], "stop")),
        ("\nhm\n</think>\n\nYes.", {"reasoning_effort": "high"}, ("hm", "Yes.", [], "stop")),
        ("<think>hm</think>Yes.", {}, ("hm", "Yes.", [], "stop")),
        ("hm 🙂", {"extra_body": THINKING}, ("hm 🙂", None, [], "stop")),
        (DEEPSEEK_V31.write_calls([PARIS]), {"tools": [WEATHER]}, (None, None, [PARIS], "tool_calls")),
        (
            "hm</think>I look." + DEEPSEEK_V31.write_calls([PARIS, OSLO]),
            {"tools": [WEATHER], "extra_body": THINKING},
            ("hm", "I look.", [PARIS, OSLO], "tool_calls"),
        ),
        ("a STOP b", {"stop": "STOP"}, (None, "a ", [], "stop")),
    ],
)
def test_whole_and_streamed_answers(
    client: OpenAI, script: ScriptedWorker, text: str, fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    script.text = text
    whole = talk(client, **fields)
    assert told(whole.choices[0]) == expected
    assert told(streamed(client, **fields)) == expected
    thought = script.tokenizer.encode(expected[0] or "", special=False)
    assert whole.usage.completion_tokens_details.reasoning_tokens == len(thought)


def test_an_answer_that_is_cut_off(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = DEEPSEEK_V31.write_calls([PARIS])
    length = len(script.tokenizer.encode(script.text[: script.text.index("ris")], special=False))
    fields: dict[str, Any] = {"tools": [WEATHER], "max_tokens": length}
    _, _, ((name, arguments),), reason = told(talk(client, **fields).choices[0])
    assert (name, reason) == ("weather", "length")
    assert arguments and PARIS[1].startswith(arguments)
    *_, last = talk(client, stream=True, **fields)
    assert last.choices[0].finish_reason == "length"


def test_calls_as_they_are_streamed(client: OpenAI, script: ScriptedWorker) -> None:
    """Each call is named once, with an id, before its arguments; the last chunk says why it ends."""
    script.text = DEEPSEEK_V31.write_calls([PARIS, OSLO])
    *chunks, usage = list(talk(client, tools=[WEATHER], stream=True, stream_options={"include_usage": True}))
    assert usage.choices == [] and usage.usage.completion_tokens == len(
        script.tokenizer.encode(script.text, special=False)
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    named = [call for call in calls if call.id]
    assert [(call.index, call.type, call.function.name) for call in named] == [
        (0, "function", "weather"),
        (1, "function", "weather"),
    ]
    assert len({call.id for call in named}) == 2
    for index, (_, arguments) in enumerate((PARIS, OSLO)):
        pieces = [call.function.arguments for call in calls if call.index == index]
        assert len(pieces) > 3 and "".join(pieces) == arguments
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        "tool_calls"
    ]


def test_a_conversation_with_calls(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = DEEPSEEK_V31.write_calls([PARIS])
    first = talk(client, tools=[WEATHER]).choices[0].message
    script.text = "Yes."
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "wet"}
    answer = talk(client, messages=[*ASK, first, result], tools=[WEATHER])
    assert answer.choices[0].message.content == "Yes."
    assert DEEPSEEK_V31.write_calls([PARIS]) in script.prompt
    assert script.prompt.endswith("<｜tool▁output▁begin｜>wet<｜tool▁output▁end｜>")
    assert "### weather" in script.prompt


def grammar(script: ScriptedWorker) -> Any:
    found = script.jobs[0].params.grammar
    return found and json.loads(found)


def test_what_an_answer_must_look_like(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = "{}"
    talk(client)
    assert grammar(script) is None
    talk(client, tools=[WEATHER])
    assert grammar(script) is None
    talk(client, response_format={"type": "json_object"})
    assert grammar(script) == {"type": "json_object"}
    talk(client, response_format={"type": "json_object"}, extra_body=THINKING)
    assert grammar(script) == {"type": "json_object", "after": "</think>"}
    talk(client, extra_body={"guided_choice": ["a", "b"]})
    assert grammar(script) == {"type": "choice", "choices": ["a", "b"]}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        talk(client, tools=[WEATHER], tool_choice=choice, extra_body=THINKING)
        found = grammar(script)
        assert (found["type"], found["after"]) == ("structural_tag", "</think>")
        (tag,) = found["format"]["elements"][1]["tags"]
        assert tag["content"] == {"type": "json_schema", "json_schema": PARAMETERS}


def test_the_client_parses_what_it_asked_for(client: OpenAI, script: ScriptedWorker) -> None:
    class Weather(BaseModel):
        city: str

    script.text = '{"city": "Paris"}'
    answer = client.chat.completions.parse(model=NAME, messages=ASK, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Paris")
    assert grammar(script)["schema"]["properties"]["city"]["type"] == "string"
    script.text = DEEPSEEK_V31.write_calls([PARIS])
    tool = openai.pydantic_function_tool(Weather, name="weather")
    called = client.chat.completions.parse(model=NAME, messages=ASK, tools=[tool])
    (call,) = called.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Weather(city="Paris")


def test_parameters_that_only_the_engine_knows_arrive(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = "a"
    extra = {"min_tokens": 2, "allowed_token_ids": [5, 6], "bad_words": ["x"], "top_k": 3}
    talk(client, logit_bias={"5": -100, "6": 1}, n=2, seed=4, extra_body=extra)
    params = script.jobs[0].params
    assert params.logit_bias == {5: -100, 6: 1}
    assert (params.min_tokens, list(params.allowed_token_ids or ()), list(params.bad_words)) == (
        2,
        [5, 6],
        ["x"],
    )
    assert [job.params.seed for job in script.jobs] == [4, 5]


def test_an_answer_can_be_continued(client: OpenAI, script: ScriptedWorker) -> None:
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    talk(client, messages=begun, extra_body={"continue_final_message": True})
    assert script.prompt.endswith("<｜Assistant｜></think>It is")
    names = {
        "messages": "x",
        "self": 1,
        "tools": 2,
        "thinking": True,
    }  # of things that are not for clients to set
    assert talk(client, extra_body={"chat_template_kwargs": names}).choices[0].message.role == "assistant"
    talk(client, messages=begun)
    assert not script.prompt.endswith("It is")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "image_url"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format", "name"),
        ({"extra_body": {"guided_json": "{"}}, "structured_outputs", "JSON"),
    ],
)  # fmt: skip
def test_what_is_refused(client: OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        talk(client, **fields)
    assert info.value.param == param
    assert words in info.value.message


def test_an_engine_that_fails_ends_a_stream_with_an_error(client: OpenAI, script: ScriptedWorker) -> None:
    script.text, script.fails = "a b c d", 2
    with pytest.raises(openai.APIError, match="on purpose"):
        list(talk(client, stream=True))


def test_tokens_and_texts(client: OpenAI, script: ScriptedWorker) -> None:
    def post(path: str, **body: Any) -> Any:
        return client.post(f"{client.base_url.copy_with(path=path)}", cast_to=object, body=body)

    found = post("/tokenize", model=NAME, prompt="Once 🙂", return_token_strs=True)
    assert found["tokens"] == script.tokenizer.encode("Once 🙂")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert post("/tokenize", prompt="Once", add_special_tokens=False)["tokens"] == script.tokenizer.encode(
        "Once", special=False
    )
    talk(client, tools=[WEATHER])
    assert post("/tokenize", messages=ASK, tools=[WEATHER])["tokens"] == script.jobs[0].tokens
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == "<｜begin▁of▁sentence｜>Once 🙂"
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        post("/detokenize", tokens=[10**15])


def test_one_model_by_name(client: OpenAI) -> None:
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("other/model")
    assert info.value.code == "model_not_found"
