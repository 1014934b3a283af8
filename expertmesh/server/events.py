"""JSON answers and streams of server-sent events; their work ends when the client goes away."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class JsonAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _json(content)


class EventStream(StreamingResponse):
    """Server-sent events. Their source is closed at once when the client goes away, not when Python gets to it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes] | AsyncGenerator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def event(data: Mapping[str, Any], named: bool) -> bytes:
    """One event; named: its type is the event's name too."""
    name = b"event: " + str(data["type"]).encode() + b"\n" if named else b""
    return name + b"data: " + _json(data) + b"\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work. ClientDisconnect, and an end of the work, when the client goes away before."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working, asyncio.create_task(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(data: Any) -> bytes:
    """Compact UTF-8. Halves of surrogate pairs, which a client can spell in what is told back to it, become ?."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
