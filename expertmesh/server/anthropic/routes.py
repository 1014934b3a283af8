"""Routes of Anthropic's API."""

import asyncio

from fastapi import APIRouter, Request, Response

from expertmesh.server.anthropic import documents
from expertmesh.server.anthropic.answer import MessageAnswer
from expertmesh.server.anthropic.schema import CountRequest, MessagesRequest
from expertmesh.server.documents import answers
from expertmesh.server.errors import ANTHROPIC_PATH
from expertmesh.server.events import JsonAnswer
from expertmesh.server.service import Call, Service


def router(service: Service) -> APIRouter:
    routes, found, error = _Routes(service), APIRouter(), documents.AnthropicError
    message = answers(documents.Message, error, 400, 404, stream=True)
    count = answers(documents.TokenCount, error, 400, 404)
    found.add_api_route(ANTHROPIC_PATH, routes.messages, methods=["POST"], responses=message)
    found.add_api_route(
        f"{ANTHROPIC_PATH}/count_tokens", routes.count_tokens, methods=["POST"], responses=count
    )
    return found


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def messages(self, body: MessagesRequest, request: Request) -> Response:
        """Answer in a conversation."""
        return await self._service.respond(request, body.model, body.stream, lambda: self._call(body))

    async def count_tokens(self, body: CountRequest) -> Response:
        """How many tokens the prompt of a conversation has."""
        self._service.check_model(body.model)
        opened = await asyncio.to_thread(self._service.open, body.turn())
        return JsonAnswer({"input_tokens": len(opened.tokens)})

    def _call(self, body: MessagesRequest) -> Call:
        service, opened = self._service, self._service.open(body.turn())
        (job,) = service.jobs(opened.tokens, "messages", body.sampling() | opened.sampling)
        return Call([job], MessageAnswer(body.model, opened))
