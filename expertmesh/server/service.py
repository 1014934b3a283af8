"""What the routes of all APIs share: the one way from a request to jobs and back."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from expertmesh.engine.intake import Intake
from expertmesh.errors import InputError
from expertmesh.request import Output
from expertmesh.server.chat.constraints import grammar_of
from expertmesh.server.chat.parser import Parser
from expertmesh.server.chat.template import ChatTemplate, begins_reasoning
from expertmesh.server.chat.turn import Turn
from expertmesh.server.errors import ApiError, param_of
from expertmesh.server.events import EventStream, JsonAnswer, event, unless_gone
from expertmesh.server.worker import EngineStopped, Job, Worker

# Outputs as they grow, each with its job's number.
Outputs: TypeAlias = AsyncGenerator[tuple[int, Output]]


class Answer(Protocol):
    """What one call is answered, whole or in events. named: events have their type as a name, and nothing follows the
    last one; otherwise [DONE] does."""

    named: bool

    def whole(self, outputs: Mapping[int, Output]) -> Mapping[str, Any]: ...

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """Events before anything is generated."""
        ...

    def more(self, number: int, output: Output) -> Sequence[Mapping[str, Any]]:
        """What is new in the output of a job."""
        ...

    def closing(self) -> Sequence[Mapping[str, Any]]:
        """Events after the last output."""
        ...

    def failing(self, error: ApiError) -> Sequence[Mapping[str, Any]]:
        """Events after which nothing comes, since the rest cannot be generated."""
        ...


@dataclass(frozen=True)
class Call:
    """What a request has come to."""

    jobs: Sequence[Job]
    answer: Answer


@dataclass(frozen=True)
class Asked:
    """What a call was made of. model: the name that the client uses; stream: whether the answer comes in events."""

    request: Request
    model: str
    stream: bool
    jobs: Sequence[Job]


# Sees the outputs of a call go by: it returns the same ones.
Observer: TypeAlias = Callable[[Asked, Outputs], Outputs]


@dataclass(frozen=True)
class Opened:
    """A turn whose prompt is made. thinking: whether the answer begins with reasoning; None where there is none."""

    tokens: list[int]
    thinking: bool | None
    grammar: str | None
    turn: Turn
    template: ChatTemplate

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords of SamplingParams that the turn decides."""
        return {} if self.grammar is None else {"grammar": self.grammar}

    def parser(self) -> Parser:
        """For one answer."""
        return Parser(self.thinking, self.template.markup if self.turn.callable else None)


class Service:
    """The model that is served, under its names, and who computes. observers: see all outputs go by. InputError where
    the checkpoint has no tokenizer."""

    def __init__(
        self, intake: Intake, worker: Worker, names: Sequence[str], observers: Sequence[Observer]
    ) -> None:
        if intake.tokenizer is None:
            raise InputError(f"{intake.folder}: has no tokenizer.json, so it cannot be served")
        self.intake, self.worker, self.names, self._observers = intake, worker, names, observers
        self.tokenizer = intake.tokenizer
        self.template = ChatTemplate(self.tokenizer)
        self.created = int(time.time())

    def check_model(self, model: str) -> None:
        if model not in self.names:
            message = f"there is no model {model!r} here, only {self.names[0]!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def open(self, turn: Turn) -> Opened:
        """Prompt and grammar of a turn."""
        text = self.template.render(turn)
        thinking = begins_reasoning(text) if self.template.reasons else None
        grammar = grammar_of(turn, self.template.markup, bool(thinking))
        return Opened(self.tokenizer.encode(text, special=False), thinking, grammar, turn, self.template)

    def jobs(self, tokens: list[int], field: str, sampling: Mapping[str, Any], choices: int = 1) -> list[Job]:
        """Jobs for one prompt, checked. field: what a prompt that does not fit is called."""
        context = self.intake.max_context  # what it holds ends an output, whatever was asked for
        params = self.intake.default_params(**({"max_tokens": context} | dict(sampling)))
        try:
            self.intake.check(tokens, params)
        except InputError as error:
            code = "context_length_exceeded" if len(tokens) >= context else None
            raise ApiError(400, str(error), param_of(error) or field, code) from None
        # Choices of one prompt must differ, and a seed must give the same ones again.
        seeds = [None if params.seed is None else params.seed + i for i in range(choices)]
        return [Job(tokens, replace(params, seed=seed)) for seed in seeds]

    async def respond(
        self, request: Request, model: str, stream: bool | None, prepare: Callable[[], Call]
    ) -> Response:
        """Answer a request. prepare: makes its call; templates and tokenising take time, so it runs beside the loop."""
        self.check_model(model)
        call = await asyncio.to_thread(prepare)
        self.worker.check(len(call.jobs))  # while an error can still have its status
        outputs, asked = self.worker.generate(call.jobs), Asked(request, model, bool(stream), call.jobs)
        for observer in self._observers:
            outputs = observer(asked, outputs)
        try:
            if not stream:
                return JsonAnswer(call.answer.whole(await unless_gone(request, _collect(outputs))))
            if any(job.params.grammar is not None for job in call.jobs):  # which the engine may refuse
                outputs = await unless_gone(request, _begun(outputs))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return EventStream(self._events(request, call.answer, outputs))

    async def _events(self, request: Request, answer: Answer, outputs: Outputs) -> AsyncGenerator[bytes]:
        for data in answer.opening():
            yield event(data, answer.named)
        try:
            async with aclosing(outputs):
                async for number, output in outputs:
                    for data in answer.more(number, output):
                        yield event(data, answer.named)
        except (EngineStopped, InputError) as error:
            for data in answer.failing(ApiError.of(error).about(request.scope)):
                yield event(data, answer.named)
            return
        for data in answer.closing():
            yield event(data, answer.named)
        if not answer.named:
            yield b"data: [DONE]\n\n"


async def _collect(outputs: Outputs) -> dict[int, Output]:
    async with aclosing(outputs):
        return {number: output async for number, output in outputs}


async def _begun(outputs: Outputs) -> Outputs:
    """The same outputs, when the first one is there."""
    try:
        first = await anext(outputs)
    except BaseException:
        await outputs.aclose()
        raise

    async def all_of_them() -> Outputs:
        async with aclosing(outputs):
            yield first
            async for item in outputs:
                yield item

    return all_of_them()
