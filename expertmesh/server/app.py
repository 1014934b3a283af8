"""The application: the routes of all APIs over one service."""

from collections.abc import Sequence

from fastapi import FastAPI

from expertmesh.engine.intake import Intake
from expertmesh.server.anthropic import routes as anthropic_routes
from expertmesh.server.documents import describe
from expertmesh.server.errors import add_handlers
from expertmesh.server.openai import routes as openai_routes
from expertmesh.server.service import Service
from expertmesh.server.worker import Worker


def create_app(intake: Intake, worker: Worker, names: Sequence[str]) -> FastAPI:
    """OpenAI's and Anthropic's API for one model. worker: who computes. names: what clients may call the model, the
    first being what it calls itself. InputError where the checkpoint has no tokenizer.
    """
    service = Service(intake, worker, names)
    # Its pages of documentation would be loaded from elsewhere.
    app = FastAPI(title="ExpertMesh", docs_url=None, redoc_url=None)
    app.include_router(openai_routes.router(service))
    app.include_router(anthropic_routes.router(service))
    add_handlers(app)
    describe(app, names)
    return app
