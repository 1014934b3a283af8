"""Routes of OpenAI's API, and of vLLM's beside it."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from expertmesh.server.documents import answers
from expertmesh.server.events import JsonAnswer
from expertmesh.server.openai import documents
from expertmesh.server.openai.answer import ChatAnswer, CompletionAnswer
from expertmesh.server.openai.responses import ResponseAnswer
from expertmesh.server.openai.responses_schema import InputTokensRequest, ResponseRequest
from expertmesh.server.openai.schema import ChatRequest, CompletionRequest
from expertmesh.server.openai.tokens import DetokenizeRequest, TokenizeRequest, text_of, tokens_of
from expertmesh.server.service import Call, Service
from expertmesh.server.worker import Job


def router(service: Service) -> APIRouter:
    routes, found = _Routes(service), APIRouter()
    error = documents.Error
    add = found.add_api_route
    add("/v1/models", routes.models, methods=["GET"], responses=answers(documents.ModelList, error))
    add(
        "/v1/models/{model:path}",
        routes.model,
        methods=["GET"],
        responses=answers(documents.Model, error, 404),
    )
    for path, endpoint, answer in (
        ("/v1/completions", routes.completions, documents.Completion),
        ("/v1/chat/completions", routes.chat, documents.ChatCompletion),
        ("/v1/responses", routes.responses, documents.ResponseObject),
    ):
        add(path, endpoint, methods=["POST"], responses=answers(answer, error, 400, 404, stream=True))
    count = answers(documents.InputTokenCount, error, 400, 404)
    add("/v1/responses/input_tokens", routes.count, methods=["POST"], responses=count)
    add("/tokenize", routes.tokenize, methods=["POST"], responses=answers(documents.Tokens, error, 400, 404))
    add(
        "/detokenize",
        routes.detokenize,
        methods=["POST"],
        responses=answers(documents.Detokenized, error, 400, 404),
    )
    return found


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self) -> Response:
        """The one model that is served."""
        return JsonAnswer({"object": "list", "data": [self._model()]})

    async def model(self, model: str) -> Response:
        """The same by its name."""
        self._service.check_model(model)
        return JsonAnswer(self._model())

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        self._service.worker.check(len(body.prompts) * body.choices)  # before so many are made tokens
        return await self._service.respond(request, body.model, body.stream, lambda: self._completion(body))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer in a conversation."""
        return await self._service.respond(request, body.model, body.stream, lambda: self._chat(body))

    async def responses(self, body: ResponseRequest, request: Request) -> Response:
        """Answer in a conversation, without state: it is told in full each time."""
        return await self._service.respond(request, body.model, body.stream, lambda: self._response(body))

    async def count(self, body: InputTokensRequest) -> Response:
        """How many tokens the prompt of a response would have."""
        self._service.check_model(body.model or self._service.names[0])
        opened = await asyncio.to_thread(lambda: self._service.open(body.turn()))
        return JsonAnswer({"object": "response.input_tokens", "input_tokens": len(opened.tokens)})

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation."""
        self._service.check_model(body.model or self._service.names[0])
        return JsonAnswer(await asyncio.to_thread(tokens_of, body, self._service))

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        self._service.check_model(body.model or self._service.names[0])
        return JsonAnswer(await asyncio.to_thread(text_of, body, self._service))

    def _model(self) -> dict[str, Any]:
        service = self._service
        model = {
            "id": service.names[0],
            "object": "model",
            "created": service.created,
            "owned_by": "expertmesh",
        }
        return model | {"max_model_len": service.intake.max_context}

    def _completion(self, body: CompletionRequest) -> Call:
        service, jobs = self._service, list[Job]()
        sampling = body.sampling() | _grammar(body.constraints())
        for prompt in body.prompts:
            jobs += service.jobs(service.intake.tokens(prompt), "prompt", sampling, body.choices)
        return Call(jobs, CompletionAnswer(body, body.model, service.tokenizer))

    def _chat(self, body: ChatRequest) -> Call:
        service, opened = self._service, self._service.open(body.asked())
        jobs = service.jobs(opened.tokens, "messages", body.sampling() | opened.sampling, body.choices)
        return Call(jobs, ChatAnswer(body, body.model, service.tokenizer, opened))

    def _response(self, body: ResponseRequest) -> Call:
        service, opened = self._service, self._service.open(body.turn())
        (job,) = service.jobs(opened.tokens, "input", body.sampling() | opened.sampling)
        return Call([job], ResponseAnswer(body, body.model, service.tokenizer, opened, job.params))


def _grammar(constraints: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"grammar": json.dumps(constraints[0], ensure_ascii=False)} if constraints else {}
