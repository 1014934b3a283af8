"""Outputs of the engine as Anthropic's messages, whole or in events."""

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from expertmesh.request import Output
from expertmesh.server.chat.parser import Begin, Piece
from expertmesh.server.chat.reading import Block, Reading
from expertmesh.server.errors import ApiError
from expertmesh.server.service import Opened

Data = dict[str, Any]
_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "content": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


class MessageAnswer:
    named = True

    def __init__(self, name: str, opened: Opened) -> None:
        self._name, self._prompt = name, len(opened.tokens)
        self._reading = Reading(opened.parser())
        self._id = f"msg_{uuid.uuid4().hex}"
        self._output: Output | None = None

    def whole(self, outputs: Mapping[int, Output]) -> Data:
        (self._output,) = outputs.values()
        self._reading.more(self._output)
        content = [_content(block, block.text) for block in self._reading.blocks]
        return self._message() | {
            "content": content,
            **self._stop(self._output),
            "usage": _usage(self._output),
        }

    def opening(self) -> list[Data]:
        return [{"type": "message_start", "message": self._message()}, {"type": "ping"}]

    def more(self, number: int, output: Output) -> list[Data]:
        self._output = output
        events = list[Data]()
        for at, event in self._reading.more(output):
            block = self._reading.blocks[at]
            if isinstance(event, Begin):
                events.append(
                    {"type": "content_block_start", "index": at, "content_block": _content(block, "")}
                )
            elif isinstance(event, Piece):
                kind, field = _DELTAS[block.kind]
                events.append(_delta(at, {"type": kind, field: event.text}))
            else:
                if block.kind == "reasoning":
                    events.append(
                        _delta(at, {"type": "signature_delta", "signature": _signature(block.text)})
                    )
                events.append({"type": "content_block_stop", "index": at})
        return events

    def closing(self) -> list[Data]:
        assert self._output
        end = {"type": "message_delta", "delta": self._stop(self._output), "usage": _usage(self._output)}
        return [end, {"type": "message_stop"}]

    def failing(self, error: ApiError) -> list[Data]:
        return [error.anthropic()]

    def _message(self) -> Data:
        """As it begins."""
        usage = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self._prompt, **usage},
        }

    def _stop(self, output: Output) -> Data:
        if output.finish_reason != "stop":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        reason = "stop_sequence" if output.stop_text else "tool_use" if self._reading.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": output.stop_text}


def _delta(at: int, delta: Data) -> Data:
    return {"type": "content_block_delta", "index": at, "delta": delta}


def _usage(output: Output) -> Data:
    return {
        "input_tokens": len(output.prompt_token_ids) - output.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": output.cached_tokens,
        "output_tokens": len(output.token_ids),
    }


def _content(block: Block, text: str) -> Data:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": _object(text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": _signature(text) if text else ""}
    return {"type": "text", "text": text}


def _object(text: str) -> Data:
    """Arguments, also of a call that the end of the output has cut off. What is no object is told as it is."""
    try:
        found = from_json(text or "{}", allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}


def _signature(thinking: str) -> str:
    """Clients hand it back with the block; it is not checked."""
    return hashlib.sha256(thinking.encode("utf-8", "replace")).hexdigest()
