"""Conversations as prompts: by the checkpoint's chat template, with tools also where the template knows none."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from expertmesh.engine.markup import DEEPSEEK_V3, DEEPSEEK_V31, END_THINK, KIMI_K2, THINK, ToolMarkup
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.errors import InputError
from expertmesh.server.chat.turn import Message, Tool, Turn


@dataclass(frozen=True)
class Skills:
    """What a chat template can show, found out by trying. calls: calls of tools and their results; objects: their
    arguments have to be objects and not JSON text; empty: what a message that only calls has as content; beside: a
    message may have content and calls."""

    tools: bool = False
    calls: bool = False
    objects: bool = False
    empty: str | None = None
    beside: bool = False


class ChatTemplate:
    """The chat template of a checkpoint, and the markup that its model writes. reasons: whether it knows reasoning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.markup = _markup_of(tokenizer)
        self.reasons = END_THINK in (tokenizer.template or "") or tokenizer.token_id(END_THINK) is not None
        self._skills = self._probe() if tokenizer.has_chat_template else Skills()

    def render(self, turn: Turn) -> str:
        """The prompt. InputError where the template refuses these messages."""
        beginning = ""
        messages = list(turn.messages)
        if turn.continued:
            beginning = str(messages.pop().get("content") or "")
        variables = dict(turn.variables)
        if turn.shown and self._skills.tools:
            variables["tools"] = [tool.plain() for tool in turn.shown]
        elif turn.shown:
            messages = _describe(turn.shown, self.markup, messages)
        messages = list(self._shown(messages) if self._skills.calls else _spelled(messages, self.markup))
        prompt = self._tokenizer.render(messages, **variables)
        if beginning and begins_reasoning(prompt):
            beginning = f"\n{END_THINK}\n\n{beginning}"
        return prompt + beginning

    def _shown(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Messages in the form that this template takes."""
        for message in messages:
            if not message.get("tool_calls"):
                yield message
                continue
            calls = [_objects(call) if self._skills.objects else call for call in message["tool_calls"]]
            content = message.get("content")
            if content and not self._skills.beside:
                yield {key: value for key, value in message.items() if key != "tool_calls"}
            kept = content if content and self._skills.beside else self._skills.empty
            yield {**message, "content": kept, "tool_calls": calls}

    def _probe(self) -> Skills:
        tool = Tool("probed_tool", {"type": "object", "properties": {}}).plain()
        tools = "probed_tool" in self._try([_user("u")], tools=[tool])
        for objects in (False, True):
            for empty in (None, ""):
                shown = self._try(_probed_calls(empty, objects))
                if all(text in shown for text in ("probed_call", '"probed_key": 1', "probed_result")):
                    both = self._try(_probed_calls("probed_content", objects))
                    beside = 0 <= both.find("probed_content") < both.find("probed_call")
                    return Skills(tools, True, objects, empty, beside)
        return Skills(tools)

    def _try(self, messages: Sequence[Message], **variables: Any) -> str:
        try:
            return self._tokenizer.render(messages, **variables)
        except InputError:
            return ""


def begins_reasoning(prompt: str) -> bool:
    """Whether the model's next text is reasoning, since the prompt has begun it."""
    return prompt.rstrip().endswith(THINK)


def _markup_of(tokenizer: Tokenizer) -> ToolMarkup:
    template = tokenizer.template or ""
    if KIMI_K2.section[0] in template or tokenizer.token_id(KIMI_K2.section[0]) is not None:
        return KIMI_K2
    return DEEPSEEK_V3 if DEEPSEEK_V3.call[0] in template and "```json" in template else DEEPSEEK_V31


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _probed_calls(content: str | None, objects: bool) -> list[Message]:
    function = {"name": "probed_call", "arguments": '{"probed_key": 1}'}
    call: Message = {"id": "functions.probed_call:0", "type": "function", "function": function}
    return [
        _user("u"),
        {"role": "assistant", "content": content, "tool_calls": [_objects(call) if objects else call]},
        {"role": "tool", "tool_call_id": call["id"], "name": "probed_call", "content": "probed_result"},
        {"role": "assistant", "content": "a"},
        _user("u"),
    ]


def _objects(call: Message) -> Message:
    """The call with its arguments as an object, where they are one."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        raise InputError(f"the arguments of an earlier call of {function['name']} are not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _describe(tools: Sequence[Tool], markup: ToolMarkup, messages: Sequence[Message]) -> list[Message]:
    """The conversation with the tools in its system message."""
    example = markup.write_call("NAME", "ARGUMENTS", 0)
    parts = ["## Tools", "You can call these tools:"]
    for tool in tools:
        described = f"\nDescription: {tool.description}" if tool.description else ""
        parts.append(
            f"### {tool.name}{described}\nParameters: {json.dumps(tool.parameters, ensure_ascii=False)}"
        )
    parts.append(
        f"To call tools, write exactly this, with one call after the other between the outer marks:\n"
        f"{markup.section[0]}{example}{markup.section[1]}\n"
        "NAME is the name of a tool, ARGUMENTS a JSON object that keeps to the schema in Parameters."
    )
    text = "\n\n".join(parts)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _spelled(messages: Sequence[Message], markup: ToolMarkup) -> Iterator[Message]:
    """Calls and results as plain messages, for a template that knows neither."""
    for role, group in groupby(messages, key=lambda message: message["role"]):
        if role == "tool":
            yield _user(markup.write_results([str(message["content"]) for message in group]))
            continue
        for message in group:
            calls = [
                (c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()
            ]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            said = message.get("content") or ""
            yield {**kept, "content": said + markup.write_calls(calls)} if calls else message
