"""Responses as the official client reads them: items, events in their order, tools; and no state."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from expertmesh.engine.markup import DEEPSEEK_V31
from tests.server.conftest import NAME, connect
from tests.server.scripted import ScriptedWorker

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS}
CALL = DEEPSEEK_V31.write_calls([("weather", '{"city": "Paris"}')])


@pytest.fixture
def client(script_url: str) -> Iterator[OpenAI]:
    with connect(script_url) as found:
        yield found


def respond(client: OpenAI, **fields: Any) -> Any:
    return client.responses.create(**({"model": NAME, "input": "Is it raining?"} | fields))


def without(data: Any, *keys: str) -> Any:
    """The same without these keys, at any depth."""
    if isinstance(data, dict):
        return {key: without(value, *keys) for key, value in data.items() if key not in keys}
    return [without(item, *keys) for item in data] if isinstance(data, list) else data


def test_a_text(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = "Yes."
    answer = respond(client, instructions="Be kind.", metadata={"a": "b"}, store=True, max_output_tokens=300)
    assert isinstance(answer, Response) and answer.output_text == "Yes."
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.instructions, answer.metadata, answer.model) == ("Be kind.", {"a": "b"}, NAME)
    assert answer.model_extra is not None and answer.model_extra["store"] is False
    assert script.prompt.startswith("<｜begin▁of▁sentence｜>Be kind.<｜User｜>Is it raining?")
    assert answer.usage.input_tokens == len(script.jobs[0].tokens)
    assert answer.usage.output_tokens == len(script.tokenizer.encode("Yes.", special=False))
    assert script.jobs[0].params.max_tokens == 300


def test_reasoning_and_calls(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = f"hm</think>I look.{CALL}"
    answer = respond(client, tools=[WEATHER], reasoning={"effort": "high"})
    thought, said, called = answer.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "hm", [])
    assert (said.type, said.role, said.content[0].text, said.status) == (
        "message",
        "assistant",
        "I look.",
        "completed",
    )
    assert (called.type, called.name, called.arguments) == ("function_call", "weather", '{"city": "Paris"}')
    assert answer.tools[0].name == "weather" and answer.reasoning.effort == "high"
    thought_tokens = script.tokenizer.encode("hm", special=False)
    assert answer.usage.output_tokens_details.reasoning_tokens == len(thought_tokens)
    # And on with what came of it, in the client's own form.
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "wet"}
    first = {"role": "user", "content": [{"type": "input_text", "text": "Is it raining?"}]}
    script.text = "Yes."
    assert respond(client, input=[first, *answer.output, result], tools=[WEATHER]).output_text == "Yes."
    shown = f"<｜Assistant｜></think>I look.{CALL}<｜end▁of▁sentence｜><｜tool▁output▁begin｜>wet<｜tool▁output▁end｜>"
    assert script.prompt.endswith(shown)


def test_events_of_everything(client: OpenAI, script: ScriptedWorker) -> None:
    """Every event is one of the published types, numbered, in the published order; together they are the whole."""
    script.text = f"hm hm</think>I look.{CALL}"
    fields: dict[str, Any] = {"tools": [WEATHER], "reasoning": {"effort": "low"}}
    whole = respond(client, **fields)
    events = list(respond(client, stream=True, **fields))
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        adapter.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    short = [kind for at, kind in enumerate(kinds) if not at or kind != kinds[at - 1]]
    text = [
        "output_item.added",
        "content_part.added",
        "{}.delta",
        "{}.done",
        "content_part.done",
        "output_item.done",
    ]
    call = ["output_item.added", "{}.delta", "{}.done", "output_item.done"]
    expected = ["created", "in_progress"]
    expected += [kind.format("reasoning_text") for kind in text] + [
        kind.format("output_text") for kind in text
    ]
    expected += [kind.format("function_call_arguments") for kind in call] + ["completed"]
    assert short == expected
    final = events[-1].response
    volatile = ("id", "call_id", "created_at", "completed_at")
    assert without(final.to_dict(), *volatile) == without(whole.to_dict(), *volatile)
    items = {event.output_index: event.item for event in events if event.type == "response.output_item.done"}
    assert [items[at].to_dict() for at in range(3)] == [item.to_dict() for item in final.output]
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert arguments == final.output[2].arguments
    assert events[0].response.status == "in_progress" and events[0].response.output == []


def test_the_client_puts_a_stream_together(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = f"I look.{CALL}"
    with client.responses.stream(
        model=NAME, input="Is it raining?", tools=[WEATHER | {"strict": True}]
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "I look."
    called: Any = final.output[1]
    assert called.parsed_arguments == {"city": "Paris"}


def test_an_answer_that_is_cut_off(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = "hm</think>Yes, it is raining in Paris today."
    fields: dict[str, Any] = {"max_output_tokens": 5, "reasoning": {"effort": "high"}}
    whole = respond(client, **fields)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in whole.output] == ["completed", "incomplete"]
    last = list(respond(client, stream=True, **fields))[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_formats_and_choices(client: OpenAI, script: ScriptedWorker) -> None:
    script.text = "{}"
    form = {"type": "json_schema", "name": "n", "schema": PARAMETERS, "strict": True}
    answer = respond(client, text={"format": form})
    assert json.loads(script.jobs[0].params.grammar or "") == {"type": "json_schema", "schema": PARAMETERS}
    assert answer.text.format.name == "n"
    respond(client, text={"format": {"type": "json_object"}})
    assert json.loads(script.jobs[0].params.grammar or "") == {"type": "json_object"}
    for choice in ("required", {"type": "function", "name": "weather"}):
        assert respond(client, tools=[WEATHER], tool_choice=choice).tool_choice
        assert json.loads(script.jobs[0].params.grammar or "")["type"] == "structural_tag"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": "tale " * 600}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_is_refused(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        respond(client, **fields)
    assert info.value.param == param


@pytest.mark.parametrize("given", ["Is it raining?", [{"role": "user", "content": "Is it\nraining?"}]])
def test_counting(client: OpenAI, script: ScriptedWorker, given: Any) -> None:
    fields: dict[str, Any] = {
        "input": given,
        "instructions": "Be kind.",
        "tools": [WEATHER],
        "reasoning": {"effort": "high"},
    }
    answer = respond(client, **fields)
    counted = client.responses.input_tokens.count(model=NAME, **fields)
    assert counted.to_dict() == {
        "object": "response.input_tokens",
        "input_tokens": len(script.jobs[0].tokens),
    }
    assert counted.input_tokens == answer.usage.input_tokens
    assert client.responses.input_tokens.count(**fields) == counted
    more = client.responses.input_tokens.count(**fields | {"input": "tale " * 600}).input_tokens
    assert more > 600 > counted.input_tokens  # also of what would not fit


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_counted(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.responses.input_tokens.count(model=NAME, **fields)
    assert info.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.responses.input_tokens.count(model="other", input="a")


def test_an_engine_that_fails_ends_a_stream_with_an_error(client: OpenAI, script: ScriptedWorker) -> None:
    script.text, script.fails = "a b c d", 2
    *seen, error, failed = list(respond(client, stream=True))
    assert [event.type for event in seen[:2]] == ["response.created", "response.in_progress"]
    assert (error.type, error.code) == ("error", "engine_stopped") and "on purpose" in error.message
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.code == "server_error"
