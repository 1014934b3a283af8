"""The load generator against a server whose times and answers are known, and against one of ours."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from expertmesh import LLM, InputError
from expertmesh.bench.client import Client, base_url
from expertmesh.bench.latency import Limits
from expertmesh.bench.load import Lengths, Load
from expertmesh.bench.serve import Form, measure
from expertmesh.commands.bench_serve import add_serve
from tests.server.conftest import serving

FIRST, NEXT = 0.08, 0.02  # seconds that the server takes for the first text and for each other
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Known:
    """Answers after known times; every `bad`-th request as `fault` says."""

    def __init__(self, fault: Handler | None = None, bad: int = 0) -> None:
        self.fault, self.bad = fault, bad
        self.bodies: list[dict[str, Any]] = []
        self.together = self.most = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.together += 1
        self.most = max(self.most, self.together)
        try:
            if self.fault is not None and len(self.bodies) % self.bad == 0:
                return await self.fault(request)
            return await self.stream(request, body)
        finally:
            self.together -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for number in range(body["max_tokens"]):
            await asyncio.sleep(NEXT if number else FIRST)
            await answer.write(event({"choices": [{"index": 0, "text": "a"}]}))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await answer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\r\n\r\n")
        return answer


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\r\n\r\n"


async def refuses(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "too many"}}, status=429)


async def breaks_off(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(event({"choices": [{"index": 0, "text": "a"}]}))
    return answer


async def fails_on_its_way(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(event({"error": {"message": "a rank has died"}}) + b"data: [DONE]\n\n")
    return answer


@asynccontextmanager
async def known_server(known: Known) -> AsyncIterator[str]:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "known"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", known.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def measured(
    known: Known, form: Form | None = None, limits: Limits | None = None, **options: Any
) -> dict[str, Any]:
    lengths = {"input": Lengths.parse("--input", "7"), "output": Lengths.parse("--output", "5")}

    async def run() -> dict[str, Any]:
        async with known_server(known) as url, Client(url) as client:
            return await measure(client, form or Form(), Load(**(lengths | options)), limits)

    return asyncio.run(run())


def test_times_are_those_that_the_server_takes() -> None:
    """A busy machine makes everything later, nothing earlier."""
    known = Known()
    report = measured(known, requests=12, concurrency=4)
    latency = report["latency_ms"]
    assert report["completed"] == 12 and known.most == 4 and report["errors"] == {}
    assert 1000 * FIRST <= latency["ttft"]["p50"] <= latency["ttft"]["max"]
    assert latency["tpot"]["mean"] + 1 >= 1000 * NEXT
    assert latency["e2e"]["p50"] >= 1000 * (FIRST + 4 * NEXT)
    assert (report["input_tokens"], report["output_tokens"], report["other_lengths"]) == (84, 60, 0)
    assert report["output_tokens_per_second"] == pytest.approx(60 / report["seconds"])
    assert report["requests_per_second"] == pytest.approx(12 / report["seconds"])
    # Three rounds of four can take no less than this.
    assert report["seconds"] >= 3 * (FIRST + 4 * NEXT)
    assert report["client"]["us_per_event"] > 0


def test_prompts_differ_and_share_their_beginning() -> None:
    known = Known()
    measured(known, requests=5, prefix=3)
    _, *prompts = [body["prompt"] for body in known.bodies]  # the first one warms up
    assert {len(prompt) for prompt in prompts} == {10}
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 1
    assert len({tuple(prompt[3:]) for prompt in prompts}) == 5
    assert known.bodies[0]["prompt"] not in prompts
    assert all(1024 <= token < 3072 for prompt in prompts for token in prompt)
    assert all(
        body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in known.bodies
    )


def test_what_a_form_says_is_sent() -> None:
    known = Known()
    measured(known, Form("mine", eos=True, warmup=0, fields={"top_p": 0.5}), requests=1)
    (body,) = known.bodies
    assert (body["model"], body["top_p"]) == ("mine", 0.5) and "ignore_eos" not in body


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (refuses, "429", "too many"),
        (breaks_off, "broken off", "the stream ended before [DONE]"),
        (fails_on_its_way, "error in the stream", "a rank has died"),
    ],
)
def test_errors_are_counted_by_kind_and_are_no_goodput(fault: Handler, kind: str, words: str) -> None:
    report = measured(Known(fault, bad=3), requests=8, limits=Limits(ttft=60_000, tpot=60_000))
    assert report["errors"] == {kind: {"requests": 3, "first": words}} and report["completed"] == 5
    assert report["goodput"]["share"] == 5 / 8
    assert report["output_tokens"] == 25


def test_limits_that_nothing_keeps() -> None:
    report = measured(Known(), requests=3, limits=Limits(ttft=1000 * FIRST / 2))
    assert report["completed"] == 3 and report["goodput"]["share"] == 0


def test_arrivals_at_a_rate_are_sent_when_they_are_due() -> None:
    report = measured(Known(), requests=10, rate=50.0, burstiness=1e6)
    assert report["seconds"] >= 9 / 50 and report["client"]["late_ms"]["p50"] >= 0


def test_a_duration_ends_what_is_sent_and_not_what_runs() -> None:
    report = measured(Known(), duration=0.3, concurrency=2)
    assert report["requests"] == report["completed"] >= 2


def test_a_server_that_is_not_there_is_told_before_anything_is_measured() -> None:
    async def ask() -> None:
        async with Client("http://127.0.0.1:9") as client:
            await measure(client, Form(), Load(*[Lengths.parse("--input", "1")] * 2, requests=1))

    with pytest.raises(InputError, match=r"http://127.0.0.1:9/v1 does not answer"):
        asyncio.run(ask())


def test_a_first_request_that_fails_ends_it() -> None:
    with pytest.raises(InputError, match=r"fails \(429\): too many"):
        measured(Known(refuses, bad=1), requests=3)


def test_urls() -> None:
    assert base_url("http://a:1") == base_url("http://a:1/") == "http://a:1/v1"
    assert base_url("https://a/x/v1/") == "https://a/x/v1"
    with pytest.raises(InputError, match="is no URL of a server"):
        base_url("a:8000")


@pytest.fixture(scope="module")
def ours(demo_llm: LLM) -> Iterator[str]:
    with serving(demo_llm) as url:
        yield url


@pytest.fixture(scope="module")
def demo_llm() -> LLM:
    return LLM(max_batch_requests=8)


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("stream", [True, False])
def test_prompts_and_answers_have_exactly_the_lengths_asked_for(ours: str, api: str, stream: bool) -> None:
    """By what the server counts."""
    load = Load(Lengths.parse("--input", "uniform:20-60"), Lengths.parse("--output", "uniform:1-6"), concurrency=4,
                requests=12, prefix=5, seed=3)  # fmt: skip

    async def run() -> dict[str, Any]:
        async with Client(ours) as client:
            return await measure(client, Form(api=api, stream=stream), load)

    report = asyncio.run(run())
    arrivals = list(load.arrivals())
    assert report["completed"] == 12 and report["other_lengths"] == 0
    assert report["input_tokens"] == sum(5 + arrival.input for arrival in arrivals)
    assert report["output_tokens"] == sum(arrival.output for arrival in arrivals)
    assert (report["latency_ms"]["ttft"] is not None) == stream


def command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


def test_the_command_measures_a_url_and_prints_a_table(ours: str) -> None:
    args = command(ours, "--requests", "4", "--input", "9", "--output", "3", "--ttft", "60000")
    report = args.measure(args)
    assert json.loads(json.dumps(report)) == report
    table = args.table(report)
    assert "4 of 4 requests completed" in table and "TTFT" in table and "100.0% of all" in table


def test_the_command_tells_how_long_a_short_prompt_waits(ours: str) -> None:
    args = command(ours, "--interference", "400", "--input", "8", "--rounds", "2")
    report = args.measure(args)
    # How they compare is for a machine that does nothing else.
    assert min(report["as it is"][f"{kind}_alone_ms"] for kind in ("short", "long")) > 0
    assert "longest pause" in args.table(report)


def test_the_command_starts_a_server_and_compares_it_with_its_engine(tiny_folder: Path) -> None:
    """Both are given the same requests, so many at a time."""
    args = command(
        str(tiny_folder),
        "--offline",
        "--concurrency",
        "2",
        "--requests",
        "4",
        "--input",
        "5",
        "--output",
        "3",
    )
    report = args.measure(args)
    assert report["completed"] == 4 and report["other_lengths"] == 0
    engine = report["offline"]
    assert engine["output_tokens_per_second"] == pytest.approx(12 / engine["seconds"])
    assert engine["ratio"] * engine["output_tokens_per_second"] == pytest.approx(
        report["output_tokens_per_second"]
    )
    assert "engine without a server" in args.table(report)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("http://a", "--serve", "--nodes 2"), "--serve is of a server that is started here"),
        (("http://a", "--offline"), "--offline compares a MODEL"),
        (("--offline", "--api", "chat"), "leave out --api chat"),
        (("http://a", "--timeout", "0"), "--timeout"),
        (("http://a", "--ttft", "-5"), "--ttft -5"),
        (("http://a", "--fields", "[1]"), "--fields is no JSON object"),
        (("http://a", "--vocabulary", "1"), "--vocabulary 1"),
        (("http://a", "--interference", "100", "--input", "uniform:1-2"), "--interference takes"),
    ],
)
def test_options_that_cannot_be(words: tuple[str, ...], said: str) -> None:
    args = command(*words)
    with pytest.raises(InputError, match=said):
        args.measure(args)
