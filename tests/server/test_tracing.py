"""Traces by OpenTelemetry's own SDK: in memory, and as a collector gets them."""

import asyncio
import http.server
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import anthropic
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from expertmesh import LLM, InputError, Output, SamplingParams
from expertmesh.config import ModelConfig
from expertmesh.engine.intake import Intake
from expertmesh.server import tracing as module
from expertmesh.server.app import create_app
from expertmesh.server.service import Asked, Outputs
from expertmesh.server.tracing import Tracing
from expertmesh.server.worker import Job, Worker
from tests.server.conftest import NAME, connect, serving, serving_app
from tests.server.scripted import ScriptedWorker, template

BOUND = 60  # seconds after which something that must happen has not
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Is it raining?"}]}
PHASES = ["queue", "prefill", "decode"]


class Traced:
    """Tracing whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    def taken(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The span of the one request since the last time, and those below it in their order."""
        end = time.monotonic() + BOUND
        # A client has all of an answer before the server is through with it.
        while not any(each.kind == SpanKind.SERVER for each in self._exporter.get_finished_spans()):
            assert time.monotonic() < end
            time.sleep(0.001)
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        (span,) = (each for each in spans if each.kind == SpanKind.SERVER)
        below = [each for each in spans if each is not span]
        assert all(each.parent and each.parent.span_id == span.context.span_id for each in below)
        return span, sorted(below, key=lambda each: each.start_time or 0)

    def nothing(self) -> bool:
        return not self._exporter.get_finished_spans()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture(scope="module")
def traced_server(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Traced, ScriptedWorker, str]]:
    path = tmp_path_factory.mktemp("traced")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, path)
    shutil.copy(template("deepseek_v31"), path / "chat_template.jinja")
    intake = Intake.of(path, ModelConfig.from_folder(path))
    worker, traced = ScriptedWorker(intake), Traced()
    app = create_app(intake, cast(Worker, worker), [NAME], [traced.tracing.observed])
    with serving_app(cast(Any, traced.tracing.around(app))) as url:
        yield traced, worker, url


@pytest.fixture
def traced(traced_server: tuple[Traced, ScriptedWorker, str]) -> Traced:
    found, worker, _ = traced_server
    worker.text, worker.fails = "Yes.", -1
    return found


@pytest.fixture
def script(traced_server: tuple[Traced, ScriptedWorker, str], traced: Traced) -> ScriptedWorker:
    return traced_server[1]


@pytest.fixture
def url(traced_server: tuple[Traced, ScriptedWorker, str]) -> str:
    return traced_server[2]


def test_a_chat_by_the_conventions(traced: Traced, url: str) -> None:
    with connect(url) as client:
        answer = client.chat.completions.create(
            **cast(Any, CHAT), max_tokens=9, temperature=0.5, top_p=0.25, seed=7, stop=["x"], extra_body={"top_k": 3}
        )  # fmt: skip
    span, below = traced.taken()
    found, usage = attributes(span), answer.usage
    assert usage is not None
    assert (span.name, span.kind, span.status.status_code) == (
        f"chat {NAME}",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    (identity,) = found.pop("http.response.header.x-request-id")
    assert identity.startswith("req_") and found.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert found == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "expertmesh", "gen_ai.system": "expertmesh",
        "gen_ai.request.model": NAME, "gen_ai.request.stream": False, "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.25, "gen_ai.request.top_k": 3,
        "gen_ai.request.seed": 7, "gen_ai.request.stop_sequences": ("x",), "gen_ai.response.model": NAME,
        "gen_ai.response.finish_reasons": ("stop",), "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens, "gen_ai.usage.cache_read.input_tokens": 2,
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
    }  # fmt: skip
    assert [each.name for each in below] == PHASES
    times = [time for each in below for time in (each.start_time, each.end_time)]
    assert times == sorted(cast(list[int], times)) and times[1] == times[2] and times[3] == times[4]
    assert span.start_time and span.end_time and times[0] and times[-1]
    assert span.start_time <= times[0] and times[-1] <= span.end_time


@pytest.mark.parametrize("stream", [False, True])
def test_every_api(traced: Traced, url: str, stream: bool) -> None:
    def done(answer: Any) -> None:
        if stream:
            list(answer)

    name: Any = {"model": NAME, "stream": stream}
    messages: Any = CHAT["messages"]
    with connect(url) as one, anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as other:
        calls: dict[str, Callable[[], Any]] = {
            f"text_completion {NAME}": lambda: one.completions.create(prompt="a", **name),
            f"chat {NAME}": lambda: one.chat.completions.create(messages=messages, **name),
            f"chat {NAME} ": lambda: one.responses.create(input="a", **name),
            f"chat {NAME}  ": lambda: other.messages.create(messages=messages, max_tokens=50, **name),
        }
        for expected, call in calls.items():
            done(call())
            span, below = traced.taken()
            assert span.name == expected.strip() and [each.name for each in below] == PHASES
            assert attributes(span)["gen_ai.request.stream"] is stream
            assert attributes(span)["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_prompt_counts_once_however_many_choices_continue_it(traced: Traced, url: str) -> None:
    with connect(url) as client:
        answer = client.completions.create(model=NAME, prompt=["a", "b c d"], n=2, max_tokens=1)
    span, below = traced.taken()
    found, usage = attributes(span), answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert found["gen_ai.request.choice.count"] == 4
    assert found["gen_ai.response.finish_reasons"] == ("length",) * 4
    assert found["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert found["gen_ai.usage.output_tokens"] == usage.completion_tokens == 4
    assert found["gen_ai.usage.cache_read.input_tokens"] == usage.prompt_tokens_details.cached_tokens
    assert [each.name for each in below] == PHASES


def test_the_span_that_asked_is_the_parent(traced: Traced, url: str) -> None:
    headers = {
        "traceparent": f"00-{TRACE}-{SPAN}-01",
        "tracestate": "vendor=1",
        "x-request-id": "from-a.proxy:1",
    }
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    span, below = traced.taken()
    assert span.parent is not None and span.parent.is_remote and f"{span.parent.span_id:016x}" == SPAN
    assert {f"{each.context.trace_id:032x}" for each in (span, *below)} == {TRACE}
    assert span.context.trace_state.get("vendor") == "1"
    assert attributes(span)["http.response.header.x-request-id"] == ("from-a.proxy:1",)


def test_what_the_caller_does_not_sample_is_not_traced(traced: Traced, url: str) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    assert traced.nothing()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json"])
def test_only_what_generates_is_traced(traced: Traced, url: str, path: str) -> None:
    assert httpx.get(f"{url}{path}", timeout=BOUND).status_code == 200
    assert httpx.post(f"{url}/tokenize", json={"prompt": "a"}).status_code == 200
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405
    assert traced.nothing()


@pytest.mark.parametrize(
    ("fields", "status"), [({"model": "other"}, 404), ({"temperature": -1}, 400), ({"messages": 1}, 400)]
)
def test_a_request_that_is_refused(traced: Traced, url: str, fields: dict[str, Any], status: int) -> None:
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT | fields).status_code == status
    span, below = traced.taken()
    assert (span.name, below, span.status.status_code) == ("chat", [], StatusCode.UNSET)
    assert attributes(span)["error.type"] == str(status) == str(attributes(span)["http.response.status_code"])


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(traced: Traced, script: ScriptedWorker, url: str, stream: bool) -> None:
    script.text, script.fails = "a b c d", 2
    answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": stream})
    span, below = traced.taken()
    assert "on purpose" in answer.text and "on purpose" in (span.status.description or "")
    assert (span.name, span.status.status_code) == (f"chat {NAME}", StatusCode.ERROR)
    assert attributes(span)["error.type"] == "engine_stopped"
    assert attributes(span)["gen_ai.response.finish_reasons"] == ("abort",)
    assert attributes(span)["gen_ai.usage.output_tokens"] == 2
    assert [each.name for each in below] == PHASES


def test_an_application_that_breaks(traced: Traced) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret")

    async def main() -> None:
        transport = httpx.ASGITransport(traced.tracing.around(broken))
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            await client.post("/v1/messages", json={})

    with pytest.raises(KeyError):
        asyncio.run(main())
    span, _ = traced.taken()
    assert (attributes(span)["error.type"], span.status.status_code) == ("KeyError", StatusCode.ERROR)
    assert "secret" not in span.to_json()


def test_a_client_that_goes_away_before_it_has_sent_all(traced: Traced) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/messages", "headers": []}
    asyncio.run(cast(Any, traced.tracing.around(silent))(scope, None, None))
    span, below = traced.taken()
    assert (attributes(span)["error.type"], span.status.status_code, below) == (
        "aborted",
        StatusCode.UNSET,
        [],
    )


def followed(
    traced: Traced, outputs: Sequence[Output], taken: int, headers: Sequence[tuple[bytes, bytes]] = ()
) -> int:
    """How many of these outputs of one choice come out of a request that takes so many of them at most."""
    job = Job([1, 2, 3], SamplingParams())

    async def source() -> Outputs:
        for output in outputs:
            yield 0, output

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen = traced.tracing.observed(Asked(Request(scope), NAME, True, [job]), source())
        while len(got) < taken:
            got.append(await anext(seen))
        await seen.aclose()

    got: list[Any] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": list(headers)}
    asyncio.run(cast(Any, traced.tracing.around(app))(scope, None, None))
    return len(got)


def grown(*queued: float) -> list[Output]:
    return [Output("r", None, [1], "", list(range(n + 1)), None, queued=s) for n, s in enumerate(queued)]


def test_a_client_that_goes_away() -> None:
    traced = Traced()
    assert followed(traced, grown(0.0, 0.0, 0.0), 2) == 2
    span, below = traced.taken()
    assert (attributes(span)["error.type"], span.status.status_code) == ("aborted", StatusCode.UNSET)
    assert attributes(span)["gen_ai.response.finish_reasons"] == ("abort",)
    assert attributes(span)["gen_ai.usage.output_tokens"] == 2 and [each.name for each in below] == PHASES


def test_before_the_first_token_there_are_no_phases() -> None:
    traced = Traced()
    followed(traced, [Output("r", None, [1], "", [], None)], 1)
    span, below = traced.taken()
    assert below == [] and "gen_ai.response.time_to_first_chunk" not in attributes(span)


@pytest.mark.parametrize(("queued", "within"), [(1e-6, True), (1e6, False)])
def test_the_queue_ends_where_the_engine_says_and_before_the_first_token(queued: float, within: bool) -> None:
    traced = Traced()
    followed(traced, grown(queued, queued), 2)
    queue, prefill, _ = traced.taken()[1]
    assert queue.start_time and queue.end_time and prefill.end_time
    assert (queue.end_time - queue.start_time == 1000) is within
    assert (queue.end_time < prefill.end_time) is within and queue.end_time <= prefill.end_time


@given(st.binary(max_size=80))
def test_a_traceparent_that_is_none_begins_a_trace(value: bytes) -> None:
    traced = Traced()
    followed(traced, grown(0.0), 1, [(b"traceparent", value)])
    span, _ = traced.taken()
    assert span.parent is None and span.context.is_valid


# What a collector gets


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps what it gets, once it may answer."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = cast(Any, self.server)
        server.asked.set()
        server.answers.wait()
        server.got.append(
            (
                self.path,
                {k.lower(): v for k, v in self.headers.items()},
                ExportTraceServiceRequest.FromString(body),
            )
        )
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def collecting() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.got, server.asked, server.answers = [], threading.Event(), threading.Event()
    server.answers.set()
    server.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.answers.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collector_gets_what_a_server_does(
    new_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the end: what is left is sent before the server is gone. OpenTelemetry's own variables count."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=one")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=here")
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    with collecting() as collector:
        with serving(new_llm(), traces=collector.url) as url, connect(url) as client:
            answer = client.completions.create(
                model=NAME, prompt="a", max_tokens=3, extra_body={"ignore_eos": True}, extra_headers=headers
            )
            with pytest.raises(openai.NotFoundError) as refused:
                client.completions.create(model="other", prompt="a")
        ((path, sent, _), *_) = collector.got
        told = [resource for _, _, body in collector.got for resource in body.resource_spans]
    assert (path, sent["x-tenant"], sent["content-type"]) == ("/v1/traces", "one", "application/x-protobuf")
    of = {each.key: each.value.string_value for each in told[0].resource.attributes}
    assert (of["service.name"], of["deployment.environment.name"]) == ("expertmesh", "here")
    spans = {span.name: span for each in told for scope in each.scope_spans for span in scope.spans}
    assert spans.keys() == {f"text_completion {NAME}", "text_completion", *PHASES}
    span = spans[f"text_completion {NAME}"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert all(spans[name].parent_span_id == span.span_id for name in PHASES)
    assert spans["queue"].end_time_unix_nano > spans["queue"].start_time_unix_nano  # the engine has told it
    found = {each.key: each.value for each in span.attributes}
    assert found["gen_ai.usage.output_tokens"].int_value == 3
    (identity,) = found["http.response.header.x-request-id"].array_value.values
    assert identity.string_value == answer._request_id
    failed = {each.key: each.value for each in spans["text_completion"].attributes}
    (identity,) = failed["http.response.header.x-request-id"].array_value.values
    assert identity.string_value == refused.value.request_id


def test_sampling_by_the_standard_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    asked = uuid.uuid4().hex
    with collecting() as collector:
        tracing = Tracing.to(collector.url)
        traced = cast(Traced, type("Held", (), {"tracing": tracing}))
        followed(traced, grown(0.0), 1)
        followed(traced, grown(0.0), 1, [(b"traceparent", f"00-{asked}-{SPAN}-01".encode())])
        tracing.close()
        (body,) = (body for *_, body in collector.got)
    spans = [span for each in body.resource_spans for scope in each.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {asked}


def test_a_collector_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH", 0.05)
    with collecting() as collector:
        collector.answers.clear()
        tracing = Tracing.to(collector.url)
        followed(cast(Traced, type("Held", (), {"tracing": tracing})), grown(0.0), 1)
        tracing.close()
        assert collector.asked.wait(BOUND) and collector.got == []


def test_variables_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9999999")
    with pytest.raises(InputError, match="OTEL_"):
        Tracing.to("http://127.0.0.1:9/v1/traces")
