"""The application: the routes of all APIs over one service."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import Response

from expertmesh.engine.intake import Intake
from expertmesh.server.anthropic import routes as anthropic_routes
from expertmesh.server.documents import describe
from expertmesh.server.errors import ApiError, add_handlers
from expertmesh.server.events import JsonAnswer
from expertmesh.server.openai import routes as openai_routes
from expertmesh.server.service import Service
from expertmesh.server.worker import Worker


def create_app(intake: Intake, worker: Worker, name: str, aliases: Sequence[str] = ()) -> FastAPI:
    """OpenAI's and Anthropic's API for one model. worker: who computes; it is started and stopped with the application.
    name: what clients call the model; aliases: what they may call it too. InputError where the checkpoint has no
    tokenizer.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await worker.stop()

    async def health() -> Response:
        """200 while the engine runs, 503 otherwise. Where experts may move, also what the balancer does."""
        if worker.problem is not None:
            return ApiError(503, worker.problem, code="engine_stopped").response("/health")
        return JsonAnswer({"status": "ok"} | worker.report())

    service = Service(intake, worker, name, aliases)
    # Its pages of documentation would be loaded from elsewhere.
    app = FastAPI(title="ExpertMesh", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_api_route(
        "/health", health, methods=["GET"], responses={503: {"description": "It does not run."}}
    )
    app.include_router(openai_routes.router(service))
    app.include_router(anthropic_routes.router(service))
    add_handlers(app)
    describe(app, [name, *aliases])
    return app
