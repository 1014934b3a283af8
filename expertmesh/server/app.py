"""The application: routes, and the way from a request to jobs and back."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from expertmesh.engine.intake import Intake, Prompt
from expertmesh.errors import InputError
from expertmesh.request import Output
from expertmesh.server.answer import Answer, ChatAnswer, CompletionAnswer
from expertmesh.server.errors import ApiError, add_handlers
from expertmesh.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from expertmesh.server.worker import EngineStopped, Job, Worker

T = TypeVar("T")


def create_app(intake: Intake, worker: Worker, name: str) -> FastAPI:
    """The OpenAI API for one model. worker: who computes; it is started and stopped with the application. name: what
    clients call the model. InputError where the checkpoint has no tokenizer.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await worker.stop()

    routes = _Routes(intake, worker, name)
    app = FastAPI(title="ExpertMesh", lifespan=lifespan)
    app.state.worker = worker
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    add_handlers(app)
    return app


class _Routes:
    def __init__(self, intake: Intake, worker: Worker, name: str) -> None:
        if intake.tokenizer is None:
            raise InputError(f"{intake.folder}: has no tokenizer.json, so it cannot be served")
        self._intake, self._worker, self._name = intake, worker, name
        self._tokenizer = intake.tokenizer
        self._created = int(time.time())

    async def health(self) -> Response:
        """200 while the engine runs, 503 otherwise. Where experts may move, also what the balancer does."""
        if self._worker.problem is not None:
            return JSONResponse(ApiError(503, self._worker.problem, code="engine_stopped").body, 503)
        return JSONResponse({"status": "ok"} | self._worker.report())

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "expertmesh"}
        return {"object": "list", "data": [model | {"max_model_len": self._intake.max_context}]}

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        jobs = await self._jobs(body, body.prompts, "prompt")
        return await self._respond(jobs, CompletionAnswer(body, self._name, self._tokenizer), body, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer in a conversation."""
        messages = [message.plain() for message in body.messages]
        jobs = await self._jobs(body, [messages], "messages")
        return await self._respond(jobs, ChatAnswer(body, self._name, self._tokenizer), body, request)

    async def _jobs(self, body: GenerationRequest, prompts: Sequence[Prompt], field: str) -> list[Job]:
        """Everything that is asked for, checked. Tokenising takes time, so it happens beside the loop."""
        if body.model != self._name:
            message = f"there is no model {body.model!r} here, only {self._name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return await asyncio.to_thread(self._make_jobs, body, prompts, field)

    def _make_jobs(self, body: GenerationRequest, prompts: Sequence[Prompt], field: str) -> list[Job]:
        context = self._intake.max_context  # what it holds ends an output, whatever was asked for
        params = self._intake.default_params(**({"max_tokens": context} | body.sampling()))
        jobs = []
        for prompt in prompts:
            tokens = self._intake.tokens(prompt)
            try:
                self._intake.check(tokens, params)
            except InputError as error:
                code = "context_length_exceeded" if len(tokens) >= context else None
                raise ApiError(400, str(error), field, code) from None
            # Choices of one prompt must differ, and a seed must give the same ones again.
            seeds = [None if params.seed is None else params.seed + i for i in range(body.choices)]
            jobs += [Job(tokens, replace(params, seed=seed)) for seed in seeds]
        return jobs

    async def _respond(
        self, jobs: list[Job], answer: Answer, body: GenerationRequest, request: Request
    ) -> Response:
        self._worker.check()  # while an error can still have its status
        if body.stream:
            return _EventStream(self._events(jobs, answer))
        try:
            outputs = await _unless_gone(request, self._collect(jobs))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole(outputs))

    async def _collect(self, jobs: list[Job]) -> dict[int, Output]:
        async with aclosing(self._worker.generate(jobs)) as outputs:
            return {number: output async for number, output in outputs}

    async def _events(self, jobs: list[Job], answer: Answer) -> AsyncGenerator[str]:
        for chunk in answer.opening(len(jobs)):
            yield _event(chunk)
        try:
            async with aclosing(self._worker.generate(jobs)) as outputs:
                async for number, output in outputs:
                    for chunk in answer.chunk(number, output):
                        yield _event(chunk)
        except EngineStopped as error:
            yield _event(ApiError.of(error).body)
            return
        for chunk in answer.closing():
            yield _event(chunk)
        yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events. Their source is closed at once when the client goes away, not when Python gets to it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work. ClientDisconnect, and an end of the work, when the client goes away before."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working, asyncio.create_task(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
