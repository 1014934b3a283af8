"""Messages as Anthropic's official client reads them: blocks, events in their order, tools, errors."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from expertmesh.engine.markup import DEEPSEEK_V31
from tests.server.conftest import NAME
from tests.server.scripted import ScriptedWorker

ASK: list[Any] = [{"role": "user", "content": "Is it raining?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "weather", "description": "Looks outside.", "input_schema": SCHEMA}
CALL = DEEPSEEK_V31.write_calls([("weather", '{"city": "Paris"}')])
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def client(script_url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=script_url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def talk(client: Anthropic, **fields: Any) -> Any:
    return client.messages.create(**({"model": NAME, "messages": ASK, "max_tokens": 2000} | fields))


def told(message: Any) -> list[Any]:
    """Blocks without what differs each time."""
    kept = ("type", "text", "thinking", "name", "input")
    return [
        {key: value for key, value in block.to_dict().items() if key in kept} for block in message.content
    ]


def thinking(text: str) -> Any:
    return {"type": "thinking", "thinking": text}


def text(said: str) -> Any:
    return {"type": "text", "text": said}


def use(city: str) -> Any:
    return {"type": "tool_use", "name": "weather", "input": {"city": city}}


@pytest.mark.parametrize(
    ("said", "fields", "blocks", "reason", "stop"),
    [
        ("Yes.", {}, [text("Yes.")], "end_turn", None),
        ("hm\n</think>\n\nYes.", {"thinking": THINKING}, [thinking("hm"), text("Yes.")], "end_turn", None),
        ("hm", {"thinking": {"type": "adaptive"}}, [thinking("hm")], "end_turn", None),
        (
            f"hm</think>I look.{CALL}",
            {"thinking": THINKING, "tools": [WEATHER]},
            [thinking("hm"), text("I look."), use("Paris")],
            "tool_use",
            None,
        ),
        ("a STOP b", {"stop_sequences": ["b", "STOP"]}, [text("a ")], "stop_sequence", "STOP"),
        ("a STOP b", {"stop_sequences": ["ST", "STOP"]}, [text("a ")], "stop_sequence", "ST"),
        ("a b", {"stop_sequences": ["STOP"]}, [text("a b")], "end_turn", None),
    ],
)
def test_whole_and_streamed_messages(
    client: Anthropic, script: ScriptedWorker, said: str, fields: Any, blocks: Any, reason: str, stop: Any
) -> None:
    script.text = said
    whole = talk(client, **fields)
    assert (told(whole), whole.stop_reason, whole.stop_sequence) == (blocks, reason, stop)
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", NAME)
    assert whole.usage.input_tokens == len(script.jobs[0].tokens) - 2
    assert whole.usage.cache_read_input_tokens == 2, "what the script pretends"
    with client.messages.stream(model=NAME, messages=ASK, max_tokens=2000, **fields) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    assert (told(final), final.stop_reason, final.stop_sequence) == (blocks, reason, stop)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_events_in_their_order(client: Anthropic, script: ScriptedWorker, script_url: str) -> None:
    script.text = f"hm hm</think>I look.{CALL}"
    body = {"model": NAME, "messages": ASK, "max_tokens": 2000, "tools": [WEATHER], "thinking": THINKING}
    answer = httpx.post(f"{script_url}/v1/messages", json=body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *frames, rest = answer.text.split("\n\n")
    assert rest == ""
    events = []
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for frame in frames:
        name, _, data = frame.partition("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        if events[-1]["type"] != "ping":
            adapter.validate_python(events[-1])
    kinds = [e["type"] + "/" + e.get("delta", {}).get("type", "") for e in events]
    short = [kind for at, kind in enumerate(kinds) if not at or kind != kinds[at - 1]]
    delta, start, stop = "content_block_delta/", "content_block_start/", "content_block_stop/"
    assert short == [
        *("message_start/", "ping/"),
        *(start, delta + "thinking_delta", delta + "signature_delta", stop),
        *(start, delta + "text_delta", stop),
        *(start, delta + "input_json_delta", stop),
        *("message_delta/", "message_stop/"),
    ]
    assert [e["index"] for e in events if e["type"] == "content_block_start"] == [0, 1, 2]
    assert events[0]["message"]["usage"]["input_tokens"] == len(script.jobs[0].tokens)


def test_a_conversation_with_tools(client: Anthropic, script: ScriptedWorker) -> None:
    script.text = f"I look.{CALL}"
    first = talk(client, tools=[WEATHER], system=[{"type": "text", "text": "Be kind."}])
    assert script.prompt.startswith("<｜begin▁of▁sentence｜>Be kind.")
    result = {
        "type": "tool_result",
        "tool_use_id": first.content[1].id,
        "content": [{"type": "text", "text": "wet"}],
    }
    messages = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    script.text = "Yes."
    assert told(talk(client, messages=messages, tools=[WEATHER])) == [text("Yes.")]
    shown = f"I look.{CALL}<｜end▁of▁sentence｜><｜tool▁output▁begin｜>wet<｜tool▁output▁end｜>"
    assert script.prompt.endswith(shown)
    failed = result | {"is_error": True}
    messages[-1] = {"role": "user", "content": [failed, {"type": "text", "text": "Well?"}]}
    talk(client, messages=messages, tools=[WEATHER])
    assert "Error: wet<｜tool▁output▁end｜><｜User｜>Well?" in script.prompt


def test_an_answer_that_has_begun(client: Anthropic, script: ScriptedWorker) -> None:
    script.text = " raining."
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    assert told(talk(client, messages=begun)) == [text(" raining.")]
    assert script.prompt.endswith("<｜Assistant｜></think>It is")


def test_parameters_and_choices(client: Anthropic, script: ScriptedWorker) -> None:
    script.text = CALL
    sampling = {"temperature": 0.5, "top_p": 0.5, "top_k": 7}
    talk(client, extra_body=sampling, stop_sequences=["x"], metadata={"user_id": "u"})
    params = script.jobs[0].params
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.5, 7, ("x",))
    assert (params.max_tokens, params.grammar) == (2000, None)
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
        talk(client, tools=[WEATHER], tool_choice=choice)
        form = json.loads(script.jobs[0].params.grammar or "")["format"]["elements"][1]
        assert form["tags"][0]["content"]["json_schema"] == SCHEMA
        assert form["stop_after_first"] == ("disable_parallel_tool_use" in choice)
    assert told(talk(client, tools=[WEATHER], tool_choice={"type": "none"})) == [text(CALL)]
    talk(client, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert json.loads(script.jobs[0].params.grammar or "") == {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{"city": "Paris", "day": 1', {"city": "Paris", "day": 1}),
        ("{", {}),
        ("{oh}", {"INVALID_JSON": "{oh}"}),
    ],
)
def test_arguments_that_are_no_object(
    client: Anthropic, script: ScriptedWorker, arguments: str, found: Any
) -> None:
    script.text = f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{arguments}"
    (block,) = talk(client, tools=[WEATHER]).content
    assert block.input == found


def test_counting(client: Anthropic, script: ScriptedWorker) -> None:
    talk(client, tools=[WEATHER], system="Be kind.")
    count = client.messages.count_tokens(model=NAME, messages=ASK, tools=[WEATHER], system="Be kind.")
    assert count.input_tokens == len(script.jobs[0].tokens)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "'other'"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "tale " * 600}]}, anthropic.BadRequestError, "512"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            anthropic.BadRequestError,
            "image",
        ),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "temperature"),
        ({"thinking": THINKING, "max_tokens": 1024}, anthropic.BadRequestError, "budget_tokens"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            anthropic.BadRequestError,
            "tools",
        ),
        ({"tool_choice": {"type": "tool", "name": "x"}}, anthropic.BadRequestError, "'x'"),
        ({"stop_sequences": [""]}, anthropic.BadRequestError, "not empty"),
    ],
)
def test_errors(client: Anthropic, fields: Any, kind: type[anthropic.APIStatusError], words: str) -> None:
    with pytest.raises(kind) as info:
        talk(client, **fields)
    body: Any = info.value.body
    names = {400: "invalid_request_error", 404: "not_found_error"}
    assert (body["type"], body["error"]["type"]) == ("error", names[info.value.status_code])
    assert words in body["error"]["message"] and body["request_id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind"),
    [
        ("POST", "/v1/messages", b"{", 400, "invalid_request_error"),
        ("POST", "/v1/messages", b'{"model": "tiny"}', 400, "invalid_request_error"),
        ("GET", "/v1/messages", b"", 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", b"{}", 404, "not_found_error"),
    ],
)  # fmt: skip
def test_errors_that_the_client_does_not_make(
    script_url: str, method: str, path: str, content: bytes, status: int, kind: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.request(method, script_url + path, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_an_engine_that_fails_ends_a_stream_with_an_error(client: Anthropic, script: ScriptedWorker) -> None:
    script.text, script.fails = "a b c d", 2
    with pytest.raises(anthropic.APIError, match="on purpose"):
        for _ in talk(client, stream=True):
            pass
