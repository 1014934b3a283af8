"""Outputs of the engine in OpenAI's form, whole or in chunks."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.engine.tokenizer import TextStream, Tokenizer
from expertmesh.request import Output
from expertmesh.server.schema import ChatRequest, CompletionRequest, GenerationRequest

LOWEST = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Piece:
    """What is new of one choice. reports: (token, {token: log-probability} or None for the first of a prompt),
    where the client asked for it."""

    number: int
    text: str
    reports: Sequence[tuple[int, Mapping[int, float] | None]]
    finish_reason: str | None


class Answer:
    """What one call is answered. Choice number p * n + i is the i-th of the p-th prompt.

    A chunk tells what is new in an output since the chunk before; a whole answer tells everything at once, as if it
    were one chunk, in another wrapping.
    """

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, request: GenerationRequest, name: str, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._n = tokenizer, request.choices
        self._include_usage = request.include_usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self._told: dict[int, Output] = {}

    def whole(self, outputs: Mapping[int, Output]) -> dict[str, Any]:
        choices = [self._choice(self._new(number, outputs[number])) for number in sorted(outputs)]
        return self._head | {"object": self.kind, "choices": choices, "usage": self._usage()}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before anything is generated."""
        return []

    def chunk(self, number: int, output: Output) -> list[dict[str, Any]]:
        """What is new in this output, if anything is."""
        piece = self._new(number, output)
        told = piece.text or piece.reports or piece.finish_reason
        return [self._wrap([self._delta(piece)])] if told else []

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after the last choice has ended."""
        return [self._wrap([]) | {"usage": self._usage()}] if self._include_usage else []

    def _choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return self._head | {"object": self.chunk_kind, "choices": choices} | usage

    def _new(self, number: int, output: Output) -> Piece:
        before = self._told.get(number)
        self._told[number] = output
        characters, tokens = (len(before.text), len(before.token_ids)) if before else (0, 0)
        reports = list(zip(output.token_ids, output.logprobs or (), strict=False))[tokens:]
        return Piece(number, output.text[characters:], reports, output.finish_reason)

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


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest, name: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, name, tokenizer)
        self._prompts = request.prompts if request.echo else None
        self._reports = request.logprobs is not None
        # Where the next token's text begins, by number: the text so far, and how long it is.
        self._offsets: dict[int, tuple[TextStream, int]] = {}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if self._reports else None
        return {
            "index": piece.number,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    _delta = _choice

    def _new(self, number: int, output: Output) -> Piece:
        first = number not in self._told
        piece = super()._new(number, output)
        if not first or self._prompts is None:
            return piece
        prompt = self._prompts[number // self._n]
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        reports = list(zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False))
        return Piece(number, text + piece.text, [*reports, *piece.reports], piece.finish_reason)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        text_of = self._tokenizer.token_text
        stream, offset = self._offsets.get(piece.number) or (self._tokenizer.stream(), 0)
        offsets, tops, own = [], [], []
        for token, report in piece.reports:
            offsets.append(offset)
            offset += len(stream.push(token))
            own.append(None if report is None else _finite(report[token]))
            top: dict[str, float] = {}
            # Several tokens may have one text (parts of a character): the chosen one's number stands for it.
            for other, value in [(token, report[token]), *report.items()] if report else []:
                top.setdefault(text_of(other), _finite(value))
            tops.append(top or None)
        self._offsets[piece.number] = (stream, offset)
        tokens = [text_of(token) for token, _ in piece.reports]
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, name: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, name, tokenizer)
        self._top = request.top_logprobs or 0
        self._reports = bool(request.logprobs)

    def opening(self, choices: int) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [
            self._wrap([{"index": number, "delta": role, "logprobs": None, "finish_reason": None}])
            for number in range(choices)
        ]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.number, "message": message} | self._rest(piece)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        content = {"content": piece.text} if piece.text else {}
        return {"index": piece.number, "delta": content} | self._rest(piece)

    def _rest(self, piece: Piece) -> dict[str, Any]:
        entries = []
        for token, report in piece.reports:
            assert report is not None  # only a prompt has a token without
            top = [self._entry(*item) for item in list(report.items())[: self._top]]
            entries.append(self._entry(token, report[token]) | {"top_logprobs": top})
        logprobs = {"content": entries, "refusal": None} if self._reports else None
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        # A token that is a part of a character has no text of its own, and its bytes are not known here.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
