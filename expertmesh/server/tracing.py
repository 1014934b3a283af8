"""Traces of requests by OpenTelemetry, with the names of its conventions for generative AI, version 1.37 and later.

A request is a span of kind SERVER, a child of the span that its traceparent names. Below it are the phases of its
generation, which come one after the other: `queue` up to the first row, `prefill` up to the first token, `decode` up to
the last one. Prompts and answers are no part of it. This needs the extra `otel`.
"""

import threading
import time
from asyncio import CancelledError
from contextlib import aclosing

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.errors import InputError
from expertmesh.request import Output
from expertmesh.server.errors import ApiError
from expertmesh.server.identity import request_id
from expertmesh.server.service import Asked, Outputs

NAME = "expertmesh"  # of the service, where OTEL_SERVICE_NAME does not say otherwise, and of who provides the model
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
FLUSH = 3.0  # seconds at the end in which the last spans have to reach the collector
_KEY = "expertmesh.trace"  # of a scope


class Tracing:
    """Of one server: `around` its application, and an observer of its outputs (`observed`)."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider, self._tracer = provider, provider.get_tracer(NAME)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, url: str) -> "Tracing":
        """Spans go there by OTLP over HTTP, from a thread. What else there is to settle (sampling, headers, batches,
        the service's name) the SDK takes from OpenTelemetry's own variables. InputError where it cannot."""
        attributes = {"service.name": NAME} | dict(OTELResourceDetector().detect().attributes)
        try:
            provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        except (ValueError, OSError) as error:
            raise InputError(f"a variable of OpenTelemetry (OTEL_...) is wrong: {error}") from None
        return cls(provider)

    def close(self) -> None:
        """Send what there is, if that can be done in time: a collector that does not answer holds nobody up."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(FLUSH)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, its requests that generate traced."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in OPERATIONS:
                await app(scope, receive, send)
                return
            trace = scope[_KEY] = self._begin(scope)

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    trace.answered(message["status"])
                await send(message)

            try:
                await app(scope, receive, sending)
            except Exception as error:
                trace.failed(type(error).__name__, "internal error; the server's log says more")
                raise
            finally:
                trace.end()

        return traced

    def observed(self, asked: Asked, outputs: Outputs) -> Outputs:
        """The same outputs; what goes by is told in the request's span."""
        trace: _Trace | None = asked.request.scope.get(_KEY)
        return trace.follow(asked, outputs) if trace and trace.span.is_recording() else outputs

    def _begin(self, scope: Scope) -> "_Trace":
        operation, path = OPERATIONS[scope["path"]], scope["path"]
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": NAME,
            "gen_ai.system": NAME,  # what the one before was called up to 1.36
            "http.request.method": scope["method"],
            "http.route": path,
            "url.path": path,
            "http.response.header.x-request-id": [request_id(scope)],
        }
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(operation, parent, SpanKind.SERVER, attributes)
        return _Trace(self._tracer, span, operation)


class _Trace:
    """Of one request. Its first failure is the one that counts."""

    def __init__(self, tracer: Tracer, span: Span, operation: str) -> None:
        self._tracer, self.span, self._operation = tracer, span, operation
        self._answered = self._failed = False

    def end(self) -> None:
        if not self._answered:
            self.failed("aborted", None)  # the client has gone before there was anything to send
        self.span.end()

    def answered(self, status: int) -> None:
        """With this status of HTTP."""
        self._answered = True
        self.span.set_attribute("http.response.status_code", status)
        if status >= 400:
            self.failed(str(status), "" if status >= 500 else None)

    def failed(self, kind: str, message: str | None) -> None:
        """message: what has failed here; None where the failure is the client's, and the span no error."""
        if self._failed:
            return
        self._failed = True
        self.span.set_attribute("error.type", kind)
        if message is not None:
            self.span.set_status(StatusCode.ERROR, message or None)

    async def follow(self, asked: Asked, outputs: Outputs) -> Outputs:
        self.span.update_name(f"{self._operation} {asked.model}")
        self.span.set_attributes(_of_request(asked))
        begin = time.time_ns()
        first: tuple[int, float] | None = None  # when the first token came, and seconds in the queue before
        latest: dict[int, Output] = {}
        try:
            async with aclosing(outputs):
                async for number, output in outputs:
                    latest[number] = output
                    if first is None and output.token_ids:
                        first = time.time_ns(), output.queued
                    yield number, output
        except (CancelledError, GeneratorExit):
            self.failed("aborted", None)  # nobody waits for it any more
            raise
        except Exception as error:
            told = ApiError.of(error)
            self.failed(told.code or str(told.status), str(told) if told.status >= 500 else None)
            raise
        finally:
            if first is not None:
                self.span.set_attribute("gen_ai.response.time_to_first_chunk", (first[0] - begin) / 1e9)
                self._phases(begin, min(begin + round(first[1] * 1e9), first[0]), first[0], time.time_ns())
            self.span.set_attributes(_of_outputs(asked, latest))

    def _phases(self, *times: int) -> None:
        """Between these, in ns."""
        context = set_span_in_context(self.span)
        for name, start, end in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            self._tracer.start_span(name, context, start_time=start).end(end)


def _of_request(asked: Asked) -> dict[str, AttributeValue]:
    """What is asked for, the model's own recommendations included. All choices are of the same kind; their seeds count
    from the first one's."""
    params = asked.jobs[0].params
    found: dict[str, AttributeValue | None] = {
        "gen_ai.request.model": asked.model,
        "gen_ai.request.stream": asked.stream,
        "gen_ai.request.choice.count": len(asked.jobs) if len(asked.jobs) > 1 else None,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.stop_sequences": params.stop or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_outputs(asked: Asked, latest: dict[int, Output]) -> dict[str, AttributeValue]:
    """What has come of it. A prompt counts once, however many choices continue it."""
    jobs = asked.jobs
    first = {id(job.tokens): number for number, job in reversed(list(enumerate(jobs)))}.values()
    reasons = [latest[n].finish_reason if n in latest else None for n in range(len(jobs))]
    return {
        "gen_ai.response.model": asked.model,
        "gen_ai.response.finish_reasons": [reason or "abort" for reason in reasons],
        "gen_ai.usage.input_tokens": sum(len(jobs[number].tokens) for number in first),
        "gen_ai.usage.output_tokens": sum(len(output.token_ids) for output in latest.values()),
        "gen_ai.usage.cache_read.input_tokens": sum(latest[n].cached_tokens for n in first if n in latest),
    }
