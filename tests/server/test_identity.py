"""One id of a request: what clients read of it, and where else it is told."""

import asyncio
import traceback
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from expertmesh.server.identity import request_id
from tests.server.conftest import NAME, connect
from tests.server.scripted import ScriptedWorker
from tests.server.test_entrance import entrance

HELLO: Any = {"model": NAME, "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}


def scope(given: bytes) -> dict[str, Any]:
    return {"type": "http", "headers": [(b"x-request-id", given)]}


def test_openai_clients_read_it(url: str) -> None:
    with connect(url) as client:
        seen = [client.chat.completions.create(**HELLO)._request_id for _ in range(2)]
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve("other")
        with client.chat.completions.with_streaming_response.create(stream=True, **HELLO) as stream:
            seen += [error.value.request_id, stream.headers["x-request-id"]]
    assert len(set(seen)) == 4 and all(each and each.startswith("req_") for each in seen)


def test_anthropic_clients_read_it_and_errors_tell_the_same(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        answer = client.messages.create(**HELLO)
        with pytest.raises(anthropic.NotFoundError) as error:
            client.messages.create(**HELLO | {"model": "other"})
    assert answer._request_id is not None and answer._request_id.startswith("req_")
    body: Any = error.value.body
    assert error.value.request_id == body["request_id"] == error.value.response.headers["x-request-id"]


def test_a_stream_that_ends_with_an_error_tells_it(script: ScriptedWorker, script_url: str) -> None:
    script.text, script.fails = "a b c d", 2
    given = {"x-request-id": "proxy-8"}
    answer = httpx.post(
        f"{script_url}/v1/messages", json=HELLO | {"max_tokens": 9, "stream": True}, headers=given
    )
    assert '"request_id":"proxy-8"' in answer.text


@pytest.mark.parametrize(
    "path", ["/v1/models", "/nowhere", "/live", "/health", "/metrics", "/dashboard", "/v1/messages/x"]
)
def test_every_answer_has_it(url: str, path: str) -> None:
    given = {"x-request-id": "proxy-7"}
    headers = httpx.get(f"{url}{path}", headers=given).headers
    assert headers.get_list("x-request-id") == ["proxy-7"]
    assert ("request-id" in headers) is path.startswith("/v1/messages")


def test_what_is_refused_at_the_entrance_has_it_too() -> None:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(entrance(("key",)))
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.post("/v1/messages", json={})

    answer = asyncio.run(main())
    assert (answer.status_code, answer.json()["request_id"]) == (401, answer.headers["request-id"])


def test_the_log_of_a_request_that_fails_tells_it() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("a fault")

    async def main() -> None:
        app = entrance()
        app.api = broken
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            await client.post("/v1/x", headers={"x-request-id": "mine"})

    with pytest.raises(KeyError) as error:
        asyncio.run(main())
    assert "request mine: POST '/v1/x'" in "".join(traceback.format_exception(error.value))


@given(st.text("abcXYZ019-_.:/+=@", min_size=1, max_size=128))
def test_an_id_that_is_given_is_kept(name: str) -> None:
    one = scope(name.encode())
    assert request_id(one) == request_id(one) == name


@given(st.binary(max_size=200).filter(lambda b: not b.isascii() or b"\n" in b or b" " in b or len(b) > 128))
def test_an_id_that_could_be_something_else_is_not(name: bytes) -> None:
    one = scope(name)
    assert (
        request_id(one) == request_id(one)
        and request_id(one).startswith("req_")
        and len(request_id(one)) == 36
    )
    assert request_id(scope(name)) != request_id(one)
