"""Answers of POST /v1/responses: items, and the events that tell of them as they grow."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.request import Output, SamplingParams
from expertmesh.server.chat.parser import Begin, Piece
from expertmesh.server.chat.reading import Block, Reading
from expertmesh.server.errors import ApiError
from expertmesh.server.openai.answer import reasoning_tokens
from expertmesh.server.openai.responses_schema import ResponseRequest
from expertmesh.server.service import Opened

Data = dict[str, Any]
_PREFIXES = {"reasoning": "rs", "content": "msg", "call": "fc"}
_TEXTS = {"reasoning": "reasoning_text", "content": "output_text"}  # names of parts and of their events


class ResponseAnswer:
    named = True

    def __init__(
        self,
        request: ResponseRequest,
        name: str,
        tokenizer: Tokenizer,
        opened: Opened,
        params: SamplingParams,
    ) -> None:
        self._request, self._name, self._tokenizer, self._params = request, name, tokenizer, params
        self._reading = Reading(opened.parser())
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._ids: list[str] = []
        self._sequence = 0
        self._output: Output | None = None

    def whole(self, outputs: Mapping[int, Output]) -> Data:
        (self._output,) = outputs.values()
        self._reading.more(self._output)
        return self._response(self._end())

    def opening(self) -> list[Data]:
        return [
            self._event(f"response.{name}", response=self._response("in_progress"))
            for name in ("created", "in_progress")
        ]

    def more(self, number: int, output: Output) -> list[Data]:
        self._output = output
        events = list[Data]()
        for at, event in self._reading.more(output):
            if isinstance(event, Begin):
                events += self._begin(at)
            elif isinstance(event, Piece):
                events.append(self._delta(at, event.text))
            else:
                events += self._done(at)
        return events

    def closing(self) -> list[Data]:
        status = self._end()
        return [self._event(f"response.{status}", response=self._response(status))]

    def failing(self, error: ApiError) -> list[Data]:
        told = {"code": "server_error", "message": str(error)}
        failed = self._response("failed") | {"error": told}
        return [
            self._event("error", code=error.code, message=str(error), param=error.param),
            self._event("response.failed", response=failed),
        ]

    def _end(self) -> str:
        assert self._output
        return "completed" if self._output.finish_reason == "stop" else "incomplete"

    def _event(self, kind: str, **fields: Any) -> Data:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _begin(self, at: int) -> list[Data]:
        block = self._reading.blocks[at]
        empty = Block(block.kind, block.name, block.id)
        item = self._item(at, empty, "in_progress") | ({"content": []} if block.kind in _TEXTS else {})
        events = [self._event("response.output_item.added", output_index=at, item=item)]
        if block.kind in _TEXTS:
            events.append(self._event("response.content_part.added", **self._place(at), part=_part(empty)))
        return events

    def _delta(self, at: int, text: str) -> Data:
        kind = self._reading.blocks[at].kind
        if kind == "call":
            place = self._place(at, part=False)
            return self._event("response.function_call_arguments.delta", **place, delta=text)
        logprobs: Data = {"logprobs": []} if kind == "content" else {}
        return self._event(f"response.{_TEXTS[kind]}.delta", **self._place(at), delta=text, **logprobs)

    def _done(self, at: int) -> list[Data]:
        block = self._reading.blocks[at]
        item = self._item(at, block, self._status(at))
        if block.kind == "call":
            place = self._place(at, part=False)
            told = {"name": block.name, "arguments": block.text}
            events = [self._event("response.function_call_arguments.done", **place, **told)]
        else:
            logprobs: Data = {"logprobs": []} if block.kind == "content" else {}
            place = self._place(at)
            events = [
                self._event(f"response.{_TEXTS[block.kind]}.done", **place, text=block.text, **logprobs),
                self._event("response.content_part.done", **place, part=_part(block)),
            ]
        return [*events, self._event("response.output_item.done", output_index=at, item=item)]

    def _place(self, at: int, part: bool = True) -> Data:
        place = {"item_id": self._item_id(at), "output_index": at}
        return place | {"content_index": 0} if part else place

    def _item_id(self, at: int) -> str:
        for block in self._reading.blocks[len(self._ids) : at + 1]:
            self._ids.append(f"{_PREFIXES[block.kind]}_{uuid.uuid4().hex}")
        return self._ids[at]

    def _status(self, at: int) -> str:
        """An item that the end of the output has cut off is incomplete."""
        assert self._output
        last = self._output.finished and at == len(self._reading.blocks) - 1
        return self._end() if last else "completed"

    def _item(self, at: int, block: Block, status: str) -> Data:
        item: Data = {"id": self._item_id(at), "status": status}
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **called}
        if block.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": [], "content": [_part(block)]}
        return {"type": "message", **item, "role": "assistant", "content": [_part(block)]}

    def _response(self, status: str) -> Data:
        request, ended = self._request, status in ("completed", "incomplete")
        blocks = self._reading.blocks if ended else ()
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        reasoning, text = request.reasoning, request.text
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._name,
            "output": [self._item(at, block, self._status(at)) for at, block in enumerate(blocks)],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": reasoning.model_dump() if reasoning else {"effort": None, "summary": None},
            "store": False,
            "temperature": self._params.temperature,
            "text": _told(text) if text and text.format else {"format": {"type": "text"}},
            "tool_choice": _told(request.tool_choice) if request.tool_choice else "auto",
            "tools": [tool.told() for tool in request.tools or ()],
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": request.user,
        }

    def _usage(self) -> Data:
        output = self._output
        assert output
        thought = reasoning_tokens(self._tokenizer, [self._reading])
        read, written = len(output.prompt_token_ids), len(output.token_ids)
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": output.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": read + written,
        }


def _part(block: Block) -> Data:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _told(given: Any) -> Any:
    """A part of the request as it was asked."""
    return given if isinstance(given, str) else given.model_dump(by_alias=True, exclude_none=True)
