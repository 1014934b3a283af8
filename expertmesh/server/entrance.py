"""What every request passes before the API: is anybody there, may this client ask, and how much may it send."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
from collections.abc import AsyncGenerator, Sequence

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.server.errors import ApiError, is_anthropic
from expertmesh.server.identity import ANTHROPIC_HEADER, HEADER, request_id, telling
from expertmesh.server.state import EngineState
from expertmesh.server.worker import EngineStopped, Worker

OPEN = ("/live", "/ready", "/health")
BODY_TIME = 30.0  # seconds in which a request's body has to be there


class Entrance:
    """The application in front of the API's. api: None while there is none yet.

    /live says that this process is there, /ready whether requests are taken, /health whether the engine computes;
    nobody needs a key for these, nor for the dashboard's files. keys: digests (`settings.digests`); where there are
    any, everything else takes one, as `Authorization: Bearer` or `x-api-key`, and to look at something in a browser as
    the password of Basic. Every answer tells the request's id in x-request-id, and in request-id where Anthropic's
    clients look for it; the log tells it of a request that fails.
    """

    def __init__(self, worker: Worker, keys: Sequence[bytes] = (), max_body: int = 16 << 20) -> None:
        self._worker, self._keys, self._max_body = worker, tuple(keys), max_body
        self.api: ASGIApp | None = None
        self._bodies: set[asyncio.Timeout] = set()  # that are being read

    @property
    def state(self) -> EngineState:
        return self._worker.state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        name, path = request_id(scope), scope["path"]
        headers = (HEADER, ANTHROPIC_HEADER) if is_anthropic(path) else (HEADER,)
        try:
            await self._answer(scope, receive, telling(send, name, *headers))
        except Exception as error:
            error.add_note(f"request {name}: {scope['method']} {path!r}")  # the log of it shows that
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] in OPEN:
                await self._probe(scope)(scope, receive, send)
                return
            if not _is_page(scope["path"]):
                self._check_key(scope)
            if scope["method"] == "POST" or self.api is None:
                self._worker.check(1)
            assert self.api is not None  # where requests are taken it is there
            body = await self._body(scope, receive)
        except (ApiError, EngineStopped) as error:
            answer = ApiError.of(error).about(scope).response(scope["path"])
            await answer(scope, receive, send)
            return
        if body is not None:
            await self.api(scope, _begins_with(body, receive), send)

    def stop(self) -> None:
        """No body is waited for any more: nobody would answer it."""
        for limit in self._bodies:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    def _probe(self, scope: Scope) -> JSONResponse:
        if scope["method"] not in ("GET", "HEAD"):
            raise ApiError(405, f"Method Not Allowed: {scope['method']} {scope['path']}")
        headers = {"Cache-Control": "no-store"}
        if scope["path"] == "/live":
            return JSONResponse({"status": "ok"}, headers=headers)
        ready = scope["path"] == "/ready"
        status, said = self.state.readiness() if ready else self.state.health()
        if status == 200 and not ready:
            said |= self._worker.report()
        elif status == 503:
            headers["Retry-After"] = "5"
        return JSONResponse(said, status, headers)

    def _check_key(self, scope: Scope) -> None:
        """ApiError where keys are asked for and none of them is shown. Takes the same time for any wrong one."""
        if not self._keys:
            return
        shown = hashlib.sha256(_shown_key(scope)).digest()
        if sum(hmac.compare_digest(shown, key) for key in self._keys) == 0:
            kind = "Basic" if scope["path"] == "/metrics" else "Bearer"
            message = "this server takes an API key: send Authorization: Bearer KEY, or x-api-key: KEY"
            headers = {"WWW-Authenticate": f'{kind} realm="expertmesh"'}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None where the client has gone before. ApiError where it is too long, or too slow, EngineStopped
        where the server stops meanwhile: the rest is not read, and the connection ends."""
        close = {"Connection": "close"}
        too_long = ApiError(
            413, f"the body has more than {self._max_body} bytes", code="body_too_large", headers=close
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > self._max_body:
            raise too_long
        body = bytearray()
        try:
            async with self._limit():
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_body:
                        raise too_long
        except TimeoutError:
            self._worker.check()
            message_ = f"the body did not come within {BODY_TIME:g} s"
            raise ApiError(408, message_, code="timeout", headers=close) from None
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _limit(self) -> AsyncGenerator[None]:
        """Of the time to read a body. TimeoutError where it is over, or `stop` was called."""
        async with asyncio.timeout(BODY_TIME) as limit:
            self._bodies.add(limit)
            try:
                yield
            finally:
                self._bodies.discard(limit)


def _is_page(path: str) -> bool:
    """Whether it is a file of the dashboard, which asks for a key itself; what it shows takes one."""
    return path == "/dashboard" or (path.startswith("/dashboard/") and path != "/dashboard/events")


def _shown_key(scope: Scope) -> bytes:
    """The key in a request's headers, empty where there is none."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    kind, _, value = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic" and scope["method"] == "GET":  # what a browser asks its user for
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return headers.get(b"x-api-key", b"").strip()


def _begins_with(body: bytes, receive: Receive) -> Receive:
    """What receives this body, and then whatever else comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message
