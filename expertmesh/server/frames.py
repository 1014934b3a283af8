"""What the process of the engine and the one that speaks HTTP say to each other: plain data, as `launch.channel` sends.

To the engine:
    submit  key, tokens, params: a request, under a key of the sender's
    finish  key, reason: end it at once: "abort" where nobody waits any more, "stop" where a stop text is complete
    open    requests are taken
    refused message: the model cannot be served
    gone    (not sent: the other process has ended)
From the engine:
    loading done, total: bytes of the weights
    ready   capacity: choices that can run at the same time; max_context; about: what was worked out, by name
    tokens  new: key -> [tokens, logprobs, prompt_logprobs, cached tokens, finish reason], of requests that have some,
            only what is new; waited: key -> seconds in the queue, of those that are in such a frame for the first time
    refuse  key, message: a request that cannot run after all; None where that is a fault of the server, which its log
            explains
    state   status: how the engine is (`pump.Pump.status`), about twice a second
    telemetry state: what it tells of itself (`engine.telemetry`), between two steps, about as often
    failed  message, place: the engine computes nothing any more; place: rank, node, card, host, where one has failed
    drain   grace: take no new requests, and end when those that run have ended, in this time
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from expertmesh.request import Request, SamplingParams

Frame = dict[str, Any]


def plain_params(params: SamplingParams) -> Frame:
    """What is not the default."""
    values = {f.name: (getattr(params, f.name), f.default) for f in fields(params)}
    return {name: value for name, (value, default) in values.items() if value != default}


class TokenWriter:
    """Requests as the engine has them to what is new of each."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}  # tokens of each request that the other side knows

    def write(self, requests: Iterable[Request]) -> Frame:
        requests = list(requests)
        waited = {request.id: request.queued for request in requests if self.new(request)}
        return {"do": "tokens", "new": {r.id: self._news(r) for r in requests}, "waited": waited}

    def new(self, request: Request) -> bool:
        """Nothing has been told of it."""
        return request.id not in self._told

    def _news(self, request: Request) -> list[Any]:
        first = self.new(request)
        told = self._told.get(request.id, request.prompt_length)
        tokens = request.tokens[told:]
        params = request.params
        news = [
            tokens,
            request.logprobs[told - request.prompt_length :] if params.logprobs is not None else None,
            request.prompt_logprobs if first and params.prompt_logprobs is not None else None,
            request.cached_tokens,
            request.finish_reason,
        ]
        if request.finish_reason is None:
            self._told[request.id] = told + len(tokens)
        else:
            self.forget(request.id)
        return news

    def forget(self, key: str) -> None:
        """It has ended; again, nothing."""
        self._told.pop(key, None)
