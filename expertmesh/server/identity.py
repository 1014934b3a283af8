"""What a request is called: one id in its answer's headers, in errors, in the log and in traces."""

import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Message, Send

HEADER, ANTHROPIC_HEADER = b"x-request-id", b"request-id"
_KEY = "expertmesh.request_id"
_GIVEN = re.compile(rb"[A-Za-z0-9_.:/+=@-]{1,128}")  # nothing that could forge a line of a log


def request_id(scope: MutableMapping[str, Any]) -> str:
    """Of the request with this ASGI scope, the same whenever it is asked for: what a proxy in front or the client calls
    it in x-request-id, or a new one."""
    if _KEY not in scope:
        given = _GIVEN.fullmatch(dict(scope["headers"]).get(HEADER, b""))
        scope[_KEY] = given[0].decode() if given else new_id()
    found: str = scope[_KEY]
    return found


def new_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def telling(send: Send, name: str, *headers: bytes) -> Send:
    """What sends an answer with this id in these headers."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(header, name.encode()) for header in headers]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sending
