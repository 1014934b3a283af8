"""A page before an engine that is made up, and a browser to look at it."""

import asyncio
import json
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from expertmesh.server.dashboard import add_dashboard
from expertmesh.server.states import State, States
from tests.support.browser import Page, chromium, needed

LATENCY = {"ttft_p50": 0.2, "ttft_p95": 0.9, "tpot_p50": 0.03, "tpot_p95": 0.05}
ANSWER = (
    {"reasoning_content": "A fox is asked for."},
    {"content": "There was "},
    {"content": "a fox <b>&</b> a hen."},
)

PLAIN = ({"content": "A fox is asked for.</thi"}, {"content": "nk>\n\nThere was one."})


class Followed(States):
    """States that know how many follow them."""

    def __init__(self) -> None:
        super().__init__(lambda: LATENCY)
        self.followers = 0

    async def follow(self) -> AsyncGenerator[State]:
        self.followers += 1
        try:
            async for state in super().follow():
                yield state
        finally:
            self.followers -= 1


class MadeUp:
    """A server that shows what `publish` is given. key: what it wants to be shown, if anything."""

    def __init__(self, key: str | None = None) -> None:
        self.states, self.key, self.url = Followed(), key, ""
        self.questions: list[dict[str, Any]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def publish(self, state: State) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.states.publish, state)

    def fail(self, problem: str) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.states.fail, problem)

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            self._loop = asyncio.get_running_loop()
            yield

        app = FastAPI(lifespan=lifespan)
        add_dashboard(app, self.states, "made-up")

        @app.middleware("http")
        async def check(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
            wanted = request.url.path == "/dashboard/events" or request.url.path.startswith("/v1")
            if self.key and wanted and request.headers.get("Authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no key"}}, 401)
            return await go_on(request)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.questions.append(await request.json())

            async def chunks() -> AsyncGenerator[str]:
                thought = "plain" in self.questions[-1]["messages"][-1]["content"]
                for delta in PLAIN if thought else ANSWER:
                    yield f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"
                if "long" in self.questions[-1]["messages"][-1]["content"]:
                    await asyncio.sleep(3600)
                yield "data: [DONE]\n\n"

            return StreamingResponse(chunks(), media_type="text/event-stream")

        return app


@contextmanager
def running(made: MadeUp) -> Iterator[MadeUp]:
    listener = socket.create_server(("127.0.0.1", 0))
    made.url = f"http://127.0.0.1:{listener.getsockname()[1]}/dashboard"
    config = uvicorn.Config(
        made.app(), lifespan="on", ws="none", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def made_up() -> Iterator[MadeUp]:
    with running(MadeUp()) as made:
        yield made


@pytest.fixture(scope="session")
def new_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Page]]:
    with chromium(tmp_path_factory.mktemp("profile")) as new:
        yield new


@pytest.fixture
def page(new_page: Callable[[], Page]) -> Iterator[Page]:
    """A tab of its own; the test fails where it complains of anything."""
    found = new_page()
    yield found
    found.tell("Page.navigate", url="about:blank")  # nothing that a stream would keep open
    assert found.complaints == []


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which judges the accessibility of pages."""
    folder: Path = tmp_path_factory.mktemp("axe")
    npm = needed(("npm",), "npm")
    done = subprocess.run([npm, "pack", "axe-core@4"], cwd=folder, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("axe-core cannot be fetched: npm has no way to its registry")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()
