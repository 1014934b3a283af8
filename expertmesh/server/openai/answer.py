"""Outputs of the engine in OpenAI's form, whole or in chunks."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.engine.tokenizer import TextStream, Tokenizer
from expertmesh.request import Output
from expertmesh.server.chat.parser import Begin, Event, Piece
from expertmesh.server.chat.reading import Reading
from expertmesh.server.errors import ApiError
from expertmesh.server.openai.schema import ChatRequest, CompletionRequest, GenerationRequest
from expertmesh.server.service import Opened

LOWEST = -9999.0  # JSON has no infinity

Report = tuple[int, Mapping[int, float] | None]


@dataclass(frozen=True)
class News:
    """What is new of one choice. reports: (token, {token: log-probability} or None for the first of a prompt),
    where the client asked for it."""

    number: int
    text: str
    reports: Sequence[Report]
    output: Output


class ChoicesAnswer:
    """What one call is answered. Choice number p * n + i is the i-th of the p-th prompt.

    A chunk tells what is new in an output since the chunk before; a whole answer tells everything at once, as if it
    were one chunk, in another wrapping.
    """

    prefix, kind, chunk_kind = "", "", ""
    named = False

    def __init__(self, request: GenerationRequest, name: str, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._n = tokenizer, request.choices
        self._include_usage = request.include_usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self._told: dict[int, Output] = {}

    def whole(self, outputs: Mapping[int, Output]) -> dict[str, Any]:
        choices = [self._choice(self._new(number, outputs[number])) for number in sorted(outputs)]
        return self._head | {"object": self.kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def more(self, number: int, output: Output) -> list[dict[str, Any]]:
        news = self._new(number, output)
        delta = self._delta(news)
        return [] if delta is None else [self._wrap([delta])]

    def closing(self) -> list[dict[str, Any]]:
        return [self._wrap([]) | {"usage": self._usage()}] if self._include_usage else []

    def failing(self, error: ApiError) -> list[dict[str, Any]]:
        return [error.openai()]

    def _choice(self, news: News) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, news: News) -> dict[str, Any] | None:
        """Of a chunk; None where there is nothing to tell."""
        raise NotImplementedError

    def _wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return self._head | {"object": self.chunk_kind, "choices": choices} | usage

    def _new(self, number: int, output: Output) -> News:
        before = self._told.get(number)
        self._told[number] = output
        characters, tokens = (len(before.text), len(before.token_ids)) if before else (0, 0)
        reports = list(zip(output.token_ids[tokens:], (output.logprobs or ())[tokens:], strict=False))
        return News(number, output.text[characters:], reports, output)

    def _usage(self) -> dict[str, Any]:
        """Every prompt counts once, however many choices continue it."""
        first = [output for number, output in self._told.items() if number % self._n == 0]
        prompt = sum(len(output.prompt_token_ids) for output in first)
        completion = sum(len(output.token_ids) for output in self._told.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in first)},
        }


class CompletionAnswer(ChoicesAnswer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest, name: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, name, tokenizer)
        self._prompts = request.prompts if request.echo else None
        self._reports = request.logprobs is not None
        # Where the next token's text begins, by number: the text so far, and how long it is.
        self._offsets: dict[int, tuple[TextStream, int]] = {}

    def _choice(self, news: News) -> dict[str, Any]:
        logprobs = self._logprobs(news) if self._reports else None
        return {
            "index": news.number,
            "text": news.text,
            "logprobs": logprobs,
            "finish_reason": news.output.finish_reason,
        }

    def _delta(self, news: News) -> dict[str, Any] | None:
        told = news.text or news.reports or news.output.finish_reason
        return self._choice(news) if told else None

    def _new(self, number: int, output: Output) -> News:
        first = number not in self._told
        news = super()._new(number, output)
        if not first or self._prompts is None:
            return news
        prompt = self._prompts[number // self._n]
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        reports: list[Report] = list(zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False))
        return News(number, text + news.text, [*reports, *news.reports], output)

    def _logprobs(self, news: News) -> dict[str, Any]:
        text_of = self._tokenizer.token_text
        stream, offset = self._offsets.get(news.number) or (self._tokenizer.stream(), 0)
        offsets, tops, own = [], [], []
        for token, report in news.reports:
            offsets.append(offset)
            offset += len(stream.push(token))
            own.append(None if report is None else _finite(report[token]))
            top: dict[str, float] = {}
            # Several tokens may have one text (parts of a character): the chosen one's number stands for it.
            for other, value in [(token, report[token]), *report.items()] if report else []:
                top.setdefault(text_of(other), _finite(value))
            tops.append(top or None)
        self._offsets[news.number] = (stream, offset)
        tokens = [text_of(token) for token, _ in news.reports]
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}


class ChatAnswer(ChoicesAnswer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, name: str, tokenizer: Tokenizer, opened: Opened) -> None:
        super().__init__(request, name, tokenizer)
        self._top = request.top_logprobs or 0
        self._reports = bool(request.logprobs)
        self._readings = [Reading(opened.parser()) for _ in range(self._n)]

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [
            self._wrap([{"index": number, "delta": role, "logprobs": None, "finish_reason": None}])
            for number in range(self._n)
        ]

    def _choice(self, news: News) -> dict[str, Any]:
        reading = self._readings[news.number]
        reading.more(news.output)
        content, reasoning, calls = reading.text("content"), reading.text("reasoning"), reading.calls
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.text}}
                for c in calls
            ]
        return {"index": news.number, "message": message} | self._rest(news)

    def _usage(self) -> dict[str, Any]:
        thought = reasoning_tokens(self._tokenizer, self._readings)
        return super()._usage() | {"completion_tokens_details": {"reasoning_tokens": thought}}

    def _delta(self, news: News) -> dict[str, Any] | None:
        reading = self._readings[news.number]
        delta = _delta_of(reading, reading.more(news.output))
        told = delta or news.reports or news.output.finish_reason
        return {"index": news.number, "delta": delta} | self._rest(news) if told else None

    def _rest(self, news: News) -> dict[str, Any]:
        entries = []
        for token, report in news.reports:
            assert report is not None  # only a prompt has a token without
            top = [self._entry(*item) for item in list(report.items())[: self._top]]
            entries.append(self._entry(token, report[token]) | {"top_logprobs": top})
        logprobs = {"content": entries, "refusal": None} if self._reports else None
        calls = news.output.finish_reason == "stop" and self._readings[news.number].calls
        return {"logprobs": logprobs, "finish_reason": "tool_calls" if calls else news.output.finish_reason}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        # A token that is a part of a character has no text of its own, and its bytes are not known here.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


def _delta_of(reading: Reading, events: Sequence[tuple[int, Event]]) -> dict[str, Any]:
    """The events in one delta; each call that has news is in it once."""
    texts, calls = {"reasoning": "", "content": ""}, dict[int, dict[str, Any]]()
    for at, event in events:
        block = reading.blocks[at]
        if block.kind == "call":
            index = sum(before.kind == "call" for before in reading.blocks[:at])
            if isinstance(event, Begin):
                named = {
                    "id": block.id,
                    "type": "function",
                    "function": {"name": block.name, "arguments": ""},
                }
                calls[index] = {"index": index, **named}
            elif isinstance(event, Piece):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        elif isinstance(event, Piece):
            texts[block.kind] += event.text
    delta = {
        "reasoning_content": texts["reasoning"],
        "content": texts["content"],
        "tool_calls": list(calls.values()),
    }
    return {key: value for key, value in delta.items() if value}


def reasoning_tokens(tokenizer: Tokenizer, readings: Sequence[Reading]) -> int:
    """How many tokens the reasoning in these answers has, counted by its text."""
    return sum(len(tokenizer.encode(reading.text("reasoning"), special=False)) for reading in readings)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
