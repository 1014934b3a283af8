"""The process that speaks HTTP: `python -m expertmesh.server.front DESCRIPTOR`, which `run` starts.

It has no torch, so that it answers in a moment, long before the engine does, and nothing that is done to texts holds up
a step. It ends when it is told to, when the other process has ended, and never before that because of a signal: Ctrl-C
in a terminal reaches both, and it is for the engine's process to say what comes of it.
"""

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import uvicorn
import uvloop
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from expertmesh.config import ModelConfig
from expertmesh.engine.intake import Intake
from expertmesh.errors import InputError
from expertmesh.launch.channel import HEADER, Channel
from expertmesh.server.app import create_app
from expertmesh.server.entrance import Entrance
from expertmesh.server.frames import Frame
from expertmesh.server.service import Observer
from expertmesh.server.settings import Settings
from expertmesh.server.worker import EngineStopped, Worker

LAST_WORDS = 5  # seconds that clients have to read the end of their answers
REMAINS = 1.0  # seconds for which this process tells those who ask that the engine's has ended
FIRST_LINES = 30.0  # seconds in which the lines of a request have to be there
FILES, OWN_FILES = 65_536, 64  # open ones at most, and those that are no connections


class Front:
    """Serves HTTP for the engine at the other end of a connection, with a listening socket."""

    def __init__(self, settings: Settings, connection: socket.socket, listener: socket.socket) -> None:
        self._settings, self._connection, self._listener = settings, connection, listener
        self._worker = Worker(self._send, None, settings.request_timeout, settings.max_queue)
        self._entrance = Entrance(self._worker, settings.keys, settings.max_body)
        self._app: ASGIApp = self._entrance
        self._observers: list[Observer] = []

    async def run(self) -> None:
        """Until there is nobody to serve for."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        with contextlib.ExitStack() as ending:
            if self._settings.traces is not None:
                self._trace(self._settings.traces, ending)
            await self._serve()

    def _trace(self, url: str, ending: contextlib.ExitStack) -> None:
        """From now on requests are traced; ending is when the last of it is sent."""
        from expertmesh.server.tracing import Tracing  # which is an extra

        try:
            tracing = Tracing.to(url)
        except InputError as error:
            self._refuse(error)
            return
        ending.callback(tracing.close)
        self._app = tracing.around(self._entrance)
        self._observers.append(tracing.observed)

    async def _serve(self) -> None:
        server = _server(self._app, self._settings)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        intake = asyncio.create_task(asyncio.to_thread(self._intake))
        listening = asyncio.create_task(self._listen(intake))
        try:
            await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.should_exit = True
            await serving
            listening.cancel()
            self._writer.close()

    def _intake(self) -> Intake | InputError:
        folder = Path(self._settings.folder)
        try:
            intake = Intake.of(folder, ModelConfig.from_folder(folder))
            if intake.tokenizer is None:
                raise InputError(f"{folder}: has no tokenizer.json, so it cannot be served")
            return intake
        except InputError as error:
            return error

    async def _listen(self, intake: "asyncio.Task[Intake | InputError]") -> None:
        """Hear the engine, until this process has to end."""
        loop = asyncio.get_running_loop()
        intake.add_done_callback(lambda _: self._refuse(intake.result()))
        draining: asyncio.Task[None] | None = None
        while draining is None or not draining.done():
            frame = asyncio.ensure_future(self._receive())
            await asyncio.wait(
                (frame, draining) if draining else (frame,), return_when=asyncio.FIRST_COMPLETED
            )
            if not frame.done():
                frame.cancel()
                return
            message = frame.result()
            if message is None:
                await self._engine_ended()
                return
            if message["do"] == "drain":
                self._worker.hear(message)
                self._entrance.stop()
                draining = loop.create_task(self._drain(message["grace"]))
                continue
            if message["do"] == "ready":
                self._open(message, await intake)
            else:
                self._worker.hear(message)

    def _refuse(self, intake: Intake | InputError) -> None:
        if isinstance(intake, InputError):
            self._send({"do": "refused", "message": str(intake)})

    def _open(self, ready: Frame, intake: Intake | InputError) -> None:
        """From now on the API answers."""
        if isinstance(intake, InputError):
            return
        self._worker.hear(ready)
        self._worker.tokenizer = intake.tokenizer
        limited = intake.limited(self._worker.state.max_context)
        self._entrance.api = create_app(limited, self._worker, self._settings.names, self._observers)
        self._send({"do": "open"})

    async def _drain(self, grace: float) -> None:
        """No new requests; those that run may end, for a while."""
        try:
            async with asyncio.timeout(grace):
                await self._worker.idle.wait()
        except TimeoutError:
            problem = f"the server is stopping, and the {grace:g} s are over that requests had to end in"
            self._worker.end_all(EngineStopped(problem, 503, "shutting_down"))

    async def _engine_ended(self) -> None:
        """Nobody is at the other end any more."""
        told = self._worker.state.failure is not None or self._worker.state.draining
        self._worker.fail("the process of the engine has ended; the server must be restarted")
        if not told:
            await asyncio.sleep(REMAINS)

    def _send(self, frame: Frame) -> None:
        body = msgpack.packb(frame)
        self._writer.write(HEADER.pack(len(body)) + body)

    async def _receive(self) -> Frame | None:
        """The next frame; None where the other process has ended."""
        try:
            (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            frame: Frame = msgpack.unpackb(await self._reader.readexactly(size), strict_map_key=False)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return frame


class _Protocol(HttpToolsProtocol):
    """Ends connections on which the lines of a request do not come: uvicorn itself waits for them for ever."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._limit is None:
            self._limit = self.loop.call_later(FIRST_LINES, self.transport.close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN_FILES),
        timeout_graceful_shutdown=LAST_WORDS,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    return _Server(config)


def _allow_files() -> None:
    """As many as this process is allowed: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _allow_files()
    connection = socket.socket(fileno=descriptor)
    channel = Channel(connection)
    message = channel.receive()
    (listening,) = channel.receive_descriptors(1)
    front = Front(Settings.of(message), connection, socket.socket(fileno=listening))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(front.run())


if __name__ == "__main__":
    main(int(sys.argv[1]))
