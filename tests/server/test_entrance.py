"""What is let in, in front of an application that only repeats what it gets."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertmesh.server import entrance as module
from expertmesh.server.entrance import Entrance
from expertmesh.server.settings import digests
from expertmesh.server.worker import Worker

READY = {
    "do": "ready", "capacity": 4, "max_context": 9, "about": {},
    "status": {"since": 0.0, "patience": 10.0, "awaited": [], "balance": {"moved": 3}},
}  # fmt: skip


async def repeat(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await Response(scope["method"].encode() + b" " + body)(scope, receive, send)


def entrance(keys: tuple[str, ...] = (), max_body: int = 100, ready: bool = True) -> Entrance:
    worker = Worker(lambda frame: None)
    made = Entrance(worker, digests(keys), max_body)
    if ready:
        worker.hear(READY)
        made.api = repeat
    return made


def ask(app: Entrance, method: str = "POST", path: str = "/v1/x", **fields: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.request(method, path, **fields)

    return asyncio.run(main())


def basic(key: str) -> str:
    return f"Basic {base64.b64encode(f'me:{key}'.encode()).decode()}"


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({}, "POST", 401),
        ({"Authorization": "Bearer one"}, "POST", 200),
        ({"Authorization": "bearer  two "}, "POST", 200),
        ({"x-api-key": "two"}, "GET", 200),
        ({"X-API-Key": "three"}, "POST", 401),
        ({"Authorization": "Bearer "}, "POST", 401),
        ({"Authorization": "Bearer onee"}, "POST", 401),
        ({"Authorization": "Bearer \u00e9".encode("latin-1").decode("latin-1")}, "POST", 401),
        ({"Authorization": basic("one")}, "GET", 200),
        ({"Authorization": basic("one")}, "POST", 401),
        ({"Authorization": basic("three")}, "GET", 401),
        ({"Authorization": "Basic ?"}, "GET", 401),
    ],
)
def test_keys(headers: dict[str, str], method: str, status: int) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = ask(entrance(("one", "two")), method, headers=encoded)
    assert answer.status_code == status
    if status == 401:
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_browser_is_asked_for_a_key_where_it_looks_at_something() -> None:
    app = entrance(("one",))
    for path in ("/dashboard", "/dashboard/main.js"):
        assert ask(app, "GET", path).status_code == 200, "the page asks for a key itself"
    assert ask(app, "GET", "/dashboard/events").headers["WWW-Authenticate"].startswith("Bearer")
    assert ask(app, "GET", "/metrics").headers["WWW-Authenticate"].startswith("Basic")
    assert ask(app, "GET", "/metrics", headers={"Authorization": basic("one")}).status_code == 200


def test_nobody_needs_a_key_where_there_is_none_or_to_see_how_it_is() -> None:
    assert ask(entrance()).status_code == 200
    for ready in (True, False):
        app = entrance(("one",), ready=ready)
        assert ask(app, "GET", "/live").json() == {"status": "ok"}
        assert ask(app, "HEAD", "/live").status_code == 200
        for path in ("/ready", "/health"):
            assert ask(app, "GET", path).status_code == (200 if ready else 503)
            assert ask(app, "POST", path).status_code == 405
    assert ask(entrance(), "GET", "/health").json() == {"status": "ok", "balance": {"moved": 3}}


def test_before_it_is_ready_and_when_it_stops() -> None:
    app = entrance(ready=False)
    for method, path in (("POST", "/v1/x"), ("GET", "/v1/models")):
        answer = ask(app, method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["Retry-After"] == "5"
    app = entrance()
    app.state.draining = True
    answer = ask(app)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert answer.headers["Connection"] == "close"
    assert ask(app, "GET", "/v1/models").status_code == 200


async def _pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"0123456789"


@pytest.mark.parametrize(("count", "status"), [(0, 200), (10, 200), (11, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies(count: int, status: int, chunked: bool) -> None:
    answer = ask(entrance(), content=_pieces(count) if chunked else b"0123456789" * count)
    assert answer.status_code == status
    if status == 200:
        assert answer.content == b"POST " + b"0123456789" * count
    else:
        assert answer.json()["error"]["code"] == "body_too_large"
        assert answer.headers["Connection"] == "close"


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_TIME", 0.02)

    async def slow() -> AsyncIterator[bytes]:
        yield b"0"
        await asyncio.sleep(60)

    answer = ask(entrance(), content=slow())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")


def test_a_body_that_does_not_come_before_the_server_stops() -> None:
    app = entrance()

    async def slow() -> AsyncIterator[bytes]:
        yield b"0"
        app._worker.hear({"do": "drain", "grace": 30.0})
        app.stop()
        await asyncio.sleep(60)

    answer = ask(app, content=slow())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert answer.headers["Connection"] == "close"


def test_who_goes_before_the_body_is_there_is_not_answered() -> None:
    sent: list[Any] = []

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}
    asyncio.run(entrance()(scope, gone, send))
    assert sent == []


def test_behind_the_body_comes_that_the_client_has_gone() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    messages: list[Any] = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"x"}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        raise AssertionError

    made = entrance()
    made.api = app
    asyncio.run(made({"type": "http", "method": "POST", "path": "/v1/x", "headers": []}, receive, send))
    assert heard == ["http.request", "http.disconnect"]
