"""Running the server until a signal ends it."""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.server.app import create_app
from expertmesh.server.worker import Worker

GRACE = 5.0  # seconds that answers have to end in when the server stops


def check_port(host: str, port: int) -> None:
    """InputError where `serve` could not listen there; asked before a model is loaded."""
    _listen(host, port).close()


def serve(
    llm: LLM, name: str, host: str = "127.0.0.1", port: int = 8000, aliases: Sequence[str] = ()
) -> None:
    """Serve the OpenAI API until SIGINT or SIGTERM. Port 0 takes a free one. aliases: other names of the model.

    Prints the URL on standard error as soon as it listens. When it is told to stop, answers that are on their way
    have a few seconds to end, then they end with an error; a second SIGINT does not wait.
    """
    listener = _listen(host, port)
    where = f"[{host}]" if ":" in host else host
    url = f"http://{where}:{listener.getsockname()[1]}/v1"
    server = _Server(
        create_app(llm.engine.intake, Worker(llm.engine), name, aliases), f"serving {name} at {url}"
    )
    with listener, _ended_by_signals(server):
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, message: str) -> None:
        # Twice the grace: only clients that do not read their last words are cut off.
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(2 * GRACE) + 1,
        )
        super().__init__(config)
        self._worker: Worker = app.state.worker
        self._message = message

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._message, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        """What is not done in time ends with an error that says so, instead of a broken connection."""
        await asyncio.sleep(GRACE)
        await self._worker.stop()


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when it is done, under the handlers from before; with these
    that is harmless, and a signal that comes before it is ready is not lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, server.handle_exit) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} is not from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} on {host} is in use; stop what listens there or take another port"
            ) from None
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
