"""The application: the routes of all APIs over one service."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Response

from expertmesh.engine.intake import Intake
from expertmesh.server.anthropic import routes as anthropic_routes
from expertmesh.server.dashboard import add_dashboard
from expertmesh.server.documents import describe
from expertmesh.server.errors import add_handlers
from expertmesh.server.metrics import CONTENT_TYPE, Metrics
from expertmesh.server.openai import routes as openai_routes
from expertmesh.server.service import Observer, Service
from expertmesh.server.states import States
from expertmesh.server.worker import Worker


def create_app(
    intake: Intake, worker: Worker, names: Sequence[str], observers: Sequence[Observer] = ()
) -> FastAPI:
    """OpenAI's and Anthropic's API for one model. worker: who computes. names: what clients may call the model, the
    first being what it calls itself. observers: see outputs go by, beside the metrics. InputError where the checkpoint
    has no tokenizer.
    """
    metrics = Metrics()
    worker.watcher = states = States(metrics.recent)
    service = Service(intake, worker, names, [lambda _, outputs: metrics.observed(outputs), *observers])
    # Its pages of documentation would be loaded from elsewhere.
    app = FastAPI(title="ExpertMesh", docs_url=None, redoc_url=None)
    app.include_router(openai_routes.router(service))
    app.include_router(anthropic_routes.router(service))
    app.add_api_route("/metrics", _metrics_route(metrics, states), methods=["GET"], include_in_schema=False)
    add_dashboard(app, states, names[0])
    add_handlers(app)
    describe(app, names)
    return app


def _metrics_route(metrics: Metrics, states: States) -> Callable[[int], Coroutine[Any, Any, Response]]:
    async def render(experts: int = 0) -> Response:
        """What Prometheus reads. experts=1: with a series for each expert."""
        # Of a large cluster it takes its time: beside the loop.
        text = await asyncio.to_thread(metrics.render, states.latest, bool(experts))
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    return render
