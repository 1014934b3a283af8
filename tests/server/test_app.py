"""The API as the official client and a plain HTTP client see it."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from expertmesh import LLM, InputError, SamplingParams, Topology
from expertmesh.engine.plan import Plan
from expertmesh.request import Batch, StepResult
from expertmesh.server.app import create_app
from expertmesh.server.worker import Worker
from tests.server.conftest import NAME, connect, pages_held, serving

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a tale."}]
BOUND = 60  # seconds after which something that must happen has not


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def complete(client: OpenAI, **fields: Any) -> Any:
    """A greedy completion, unless told otherwise; fields that only vLLM has go where the client wants them."""
    extra = {k: fields.pop(k) for k in ("top_k", "ignore_eos", "stop_token_ids", "tools") if k in fields}
    defaults: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "temperature": 0}
    return client.completions.create(**(defaults | fields), extra_body=extra)


def talk(client: OpenAI, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(**(defaults | fields))


def said(part: Any) -> str:
    """All text of a message or a delta; this model begins with reasoning, and may not come to an end of it."""
    return (getattr(part, "reasoning_content", None) or "") + (part.content or "")


@pytest.fixture(scope="module")
def library(folder: Any) -> LLM:
    """The same model without a server."""
    return LLM(folder, page_size=4)


# What is answered


def test_models_and_health(client: OpenAI, url: str) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "expertmesh")
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_it_answers_to_every_name_by_that_name(new_llm: Callable[..., LLM]) -> None:
    with serving(new_llm(), names=("a", "b")) as url:
        for name, status in (("a", 200), ("b", 200), ("c", 404)):
            asked = {"model": name, "prompt": "x", "max_tokens": 1}
            answer = httpx.post(f"{url}/v1/completions", json=asked)
            assert answer.status_code == status and answer.json().get("model") == (
                name if status == 200 else None
            )


def test_requests_that_come_and_go_while_experts_move(new_llm: Callable[..., LLM], library: LLM) -> None:
    prompts = [f"{'ab' * number} {number}" for number in range(12)]
    expected = [library.generate(p, SamplingParams(max_tokens=12, temperature=0))[0].text for p in prompts]
    options = {"topology": Topology(1, 2), "redundant": 2, "rebalance": "every=2", "dtype": "float32"}
    with (
        new_llm(**options) as llm,
        serving(llm) as url,
        connect(url) as client,
        ThreadPoolExecutor(4) as pool,
    ):

        def ask(prompt: str) -> str:
            answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
            return answer.choices[0].text

        state: dict[str, Any] = {"moved": 0}
        for _ in range(20):
            assert list(pool.map(ask, prompts)) == expected
            state = httpx.get(f"{url}/health").json()["balance"]
            if state["moved"]:
                break
        assert state["moved"] > 0 and (state["failures"], state["error"]) == (0, None)


def test_a_completion_is_what_the_library_generates(client: OpenAI, library: LLM) -> None:
    answer = complete(client)
    (expected,) = library.generate(PROMPT, library.default_params(temperature=0.0, max_tokens=16))
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, "length", 0)
    assert choice.logprobs is None
    assert (answer.object, answer.model) == ("text_completion", NAME)
    usage = answer.usage
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.completion_tokens == 16, "OpenAI's default"
    assert usage.total_tokens == usage.prompt_tokens + 16


def test_a_chat_is_what_the_library_generates(client: OpenAI, library: LLM) -> None:
    answer = talk(client)
    (expected,) = library.generate([MESSAGES], library.default_params(temperature=0.0, max_tokens=12))
    (choice,) = answer.choices
    assert (choice.message.role, said(choice.message)) == ("assistant", expected.text)
    assert (choice.finish_reason, answer.object) == ("length", "chat.completion")
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me a tale."}]}]
    assert said(talk(client, messages=parts).choices[0].message) == expected.text
    assert said(talk(client, max_tokens=99, max_completion_tokens=12).choices[0].message) == expected.text


def test_a_chat_without_a_length_takes_what_the_context_leaves(new_llm: Callable[..., LLM]) -> None:
    with serving(new_llm(max_context=32)) as url, connect(url) as client:
        answer = talk(client, max_tokens=None, extra_body={"ignore_eos": True})
        assert answer.usage.total_tokens == 32
        assert complete(client, max_tokens=10**9, ignore_eos=True).usage.total_tokens == 32


def test_prompts_of_every_form(client: OpenAI, library: LLM) -> None:
    ids = library.tokens(PROMPT)
    other = library.tokens("春眠")
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in (PROMPT, "春眠")]
    assert complete(client, prompt=ids).choices[0].text == alone[0]
    for prompts in ([PROMPT, "春眠"], [ids, other]):
        answer = complete(client, prompt=prompts)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == len(ids) + len(other)
        assert answer.usage.completion_tokens == 32


@pytest.mark.parametrize(
    "fields", [{}, {"n": 2, "logprobs": 2}, {"prompt": ["a", "b"], "echo": True, "logprobs": 0}]
)
def test_a_streamed_completion_is_the_whole_one(client: OpenAI, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    texts, tokens = [""] * len(whole.choices), [[] for _ in whole.choices]  # type: ignore[var-annotated]
    reasons: dict[int, str] = {}
    options = {"include_usage": True}
    *chunks, last = list(complete(client, **fields, stream=True, stream_options=options))
    for chunk in chunks:
        (choice,) = chunk.choices
        assert (chunk.object, chunk.usage) == ("text_completion", None)
        assert choice.index not in reasons
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens if choice.logprobs else [] for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_streamed_chat_is_the_whole_one(client: OpenAI) -> None:
    whole = talk(client, n=2, logprobs=True, top_logprobs=1)
    texts, tokens = ["", ""], [[], []]  # type: ignore[var-annotated]
    chunks = list(talk(client, n=2, logprobs=True, top_logprobs=1, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += said(choice.delta)
        tokens[choice.index] += [e.token for e in choice.logprobs.content] if choice.logprobs else []
    assert texts == [said(choice.message) for choice in whole.choices]
    assert tokens == [[e.token for e in choice.logprobs.content] for choice in whole.choices]


def test_events_as_they_travel(url: str) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert events and all(event.startswith('data: {"id":"cmpl-') for event in events)


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def texts(**fields: Any) -> list[str]:
        return [choice.text for choice in complete(client, temperature=1, **fields).choices]

    first = texts(n=3, seed=7)
    assert len(set(first)) == 3
    assert texts(n=3, seed=7) == first
    assert texts(seed=7) == first[:1]
    assert texts(seed=8) != first[:1]
    assert texts() != texts()


def test_what_is_omitted_is_what_the_checkpoint_recommends(client: OpenAI) -> None:
    omitted = complete(client, temperature=None, seed=3).choices[0].text
    assert omitted == complete(client, temperature=0.7, top_p=0.95, seed=3).choices[0].text
    assert (
        complete(client, temperature=0.7, top_k=1, seed=3).choices[0].text == complete(client).choices[0].text
    )


def test_a_stop_text_ends_the_output(client: OpenAI) -> None:
    whole = complete(client).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    for form in (stop, ["never in it", stop]):
        choice = complete(client, stop=form).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, "stop")
    chunks = [chunk.choices[0] for chunk in complete(client, stop=stop, stream=True)]
    assert "".join(choice.text for choice in chunks) == expected
    assert chunks[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_output(client: OpenAI, library: LLM) -> None:
    (expected,) = library.generate(PROMPT, library.default_params(temperature=0.0, max_tokens=16))
    fourth = expected.token_ids[3]
    answer = complete(client, stop_token_ids=[fourth])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == expected.token_ids.index(fourth) + 1
    assert expected.text.startswith(answer.choices[0].text)


def test_logprobs_of_a_completion(client: OpenAI, library: LLM) -> None:
    (expected,) = library.generate(PROMPT, library.default_params(temperature=0.0, max_tokens=16, logprobs=3))
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    values = [
        report[token] for token, report in zip(expected.token_ids, expected.logprobs or (), strict=True)
    ]
    assert logprobs.token_logprobs == pytest.approx(values, abs=1e-4)
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs) == 16
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert 1 <= len(top) <= 4
        assert top[token] == value


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    entries = talk(client, logprobs=True, top_logprobs=2, temperature=1, seed=1).choices[0].logprobs.content
    assert len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.logprob <= entry.top_logprobs[0].logprob
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    (first, *_) = talk(client, logprobs=True).choices[0].logprobs.content
    assert first.top_logprobs == []


def test_echo_scores_a_prompt(client: OpenAI, library: LLM) -> None:
    choice = complete(client, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert len(choice.logprobs.tokens) == len(library.tokens(PROMPT))
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert complete(client, echo=True).choices[0].text == PROMPT + complete(client).choices[0].text


# What is refused


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "words"),
    [
        ({"model": "other"}, 404, "model", "model_not_found", "'other'"),
        ({"temperature": -1}, 400, "temperature", None, "at least 0"),
        ({"temperature": "hot"}, 400, "temperature", None, "number"),
        ({"top_p": 0}, 400, "top_p", None, "above 0"),
        ({"max_tokens": -1}, 400, "max_tokens", None, "at least 0"),
        ({"n": 0}, 400, "n", None, "greater than or equal to 1"),
        ({"prompt": "tale " * 600}, 400, "prompt", "context_length_exceeded", "512"),
        ({"prompt": [8192]}, 400, "prompt", None, "outside the vocabulary"),
        ({"prompt": {}}, 400, "prompt", None, "prompt must be"),
        ({"stop": ""}, 400, "stop", None, "not empty"),
        ({"logprobs": 21}, 400, "logprobs", None, "20"),
        ({"logit_bias": {"five": 1}}, 400, "logit_bias", None, "logit_bias"),
        ({"best_of": 2}, 400, "best_of", None, "not supported"),
        ({"suffix": "end"}, 400, "suffix", None, "not supported"),
        ({"tools": [{}]}, 400, "tools", None, "not supported"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", None, "stream"),
    ],
)
def test_errors(
    client: OpenAI, fields: dict[str, Any], status: int, param: str, code: str | None, words: str
) -> None:
    with pytest.raises(openai.APIStatusError) as info:
        complete(client, **fields)
    assert (info.value.status_code, info.value.param, info.value.code) == (status, param, code)
    assert info.value.type == "invalid_request_error"
    assert words in info.value.message


def test_errors_of_a_chat(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="512") as info:
        talk(client, messages=[{"role": "user", "content": "tale " * 600}])
    assert (info.value.code, info.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        talk(client, response_format={"type": "xml"})
    with pytest.raises(openai.BadRequestError, match="web_search_options"):
        talk(client, web_search_options={"search_context_size": "low"})
    with pytest.raises(openai.BadRequestError, match="messages"):
        talk(client, messages=[])


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "words"),
    [
        ("POST", "/v1/completions", b'{"model": ', 400, "not valid JSON"),
        ("POST", "/v1/completions", b"\xff", 400, "body"),
        ("POST", "/v1/completions", b"[]", 400, "JSON object"),
        ("POST", "/v1/completions", b"", 400, "JSON object"),
        ("POST", "/v1/completions", b'{"model": "tiny"}', 400, "prompt"),
        (
            "POST",
            "/v1/completions",
            b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
            400,
            "temperature",
        ),
        ("POST", "/v1/completions", b'{"model": "\\ud800", "prompt": "\\ud800"}', 400, "prompt"),
        ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": "hello"}', 400, "messages"),
        ("POST", "/v1/embeddings", b"{}", 404, "/v1/embeddings"),
        ("GET", "/v1/completions", b"", 405, "GET"),
    ],
)
def test_errors_that_the_client_does_not_make(
    url: str, method: str, path: str, content: bytes, status: int, words: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.request(method, url + path, content=content, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_turns_out_to_be_wrong_when_it_is_compiled(client: OpenAI, stream: bool) -> None:
    tag = {"format": {"type": "token", "token": 99_999_999}}
    with pytest.raises(openai.BadRequestError, match="out of the vocabulary") as caught:
        client.completions.create(
            model=NAME, prompt="a", stream=stream, extra_body={"structured_outputs": {"structural_tag": tag}}
        )
    assert caught.value.body["param"] == "grammar"  # type: ignore[index]


def test_a_checkpoint_without_a_tokenizer_is_not_served(new_llm: Callable[..., LLM]) -> None:
    engine = new_llm().engine
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        create_app(replace(engine.intake, tokenizer=None), Worker(lambda frame: None), [NAME])


# Many clients, and clients that leave


def test_parallel_requests_all_get_their_own_answer(client: OpenAI, url: str) -> None:
    prompts = [f"{PROMPT} there were {i}" for i in range(16)]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]

    async def one(client: AsyncOpenAI, number: int) -> str:
        fields: dict[str, Any] = {"model": NAME, "prompt": prompts[number], "temperature": 0}
        if number % 2:
            return str((await client.completions.create(**fields)).choices[0].text)
        stream = await client.completions.create(**fields, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(16)))

    assert asyncio.run(run()) == alone


class Gate:
    """Lets an engine's steps through one by one, so that nothing can end while a test looks away."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self._run, self._free = 0, llm.engine.ranks.run, threading.Semaphore(0)
        monkeypatch.setattr(llm.engine.ranks, "run", self)

    def __call__(self, batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        if any(batch.slices for batch in batches):  # else it shows that all ranks are there
            self.steps += 1
            self._free.acquire()
        return self._run(batches, plan)

    def open(self, steps: int) -> None:
        self._free.release(steps)


def test_who_leaves_a_stream_gives_back_all_pages(
    client: OpenAI, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(llm, monkeypatch)
    stream = complete(client, n=2, max_tokens=400, ignore_eos=True, stream=True)
    gate.open(3)
    next(iter(stream))
    wait_for(lambda: gate.steps == 4)
    assert pages_held(llm)
    stream.close()
    gate.open(100)
    wait_for(lambda: not llm.engine.busy)
    assert pages_held(llm) == 0
    assert gate.steps < 104
    gate.open(1000)
    assert complete(client).usage.completion_tokens == 16


def test_who_leaves_while_waiting_gives_back_all_pages(
    client: OpenAI, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(llm, monkeypatch)
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.3), max_tokens=400, ignore_eos=True)
    assert pages_held(llm)
    gate.open(100)
    wait_for(lambda: not llm.engine.busy)
    assert pages_held(llm) == 0
    assert gate.steps < 100
    gate.open(1000)
    assert complete(client).usage.completion_tokens == 16


# The end


def test_a_failing_engine_answers_500_and_is_unhealthy(
    new_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = new_llm()
    gate = Gate(llm, monkeypatch)
    monkeypatch.setattr(gate, "_run", lambda *_: 1 / 0)
    with serving(llm) as url, connect(url) as client:
        found: list[BaseException] = []

        def ask(**fields: Any) -> None:
            try:
                list(complete(client, **fields))
            except openai.APIError as error:
                found.append(error)

        threads = [threading.Thread(target=ask, kwargs={"stream": stream}) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_for(lambda: gate.steps == 1)
        gate.open(1)
        for thread in threads:
            thread.join()
        assert len(found) == 2
        assert all("engine failed" in str(error) for error in found)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="engine failed") as info:
                complete(client, stream=stream)
            assert (info.value.status_code, info.value.type) == (500, "server_error")
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503
        assert "engine failed" in health.json()["error"]["message"]
        assert client.models.list().data[0].id == NAME
    assert "ZeroDivisionError" in caplog.text


def test_a_rank_that_dies_while_nobody_asks(
    new_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        new_llm(topology=Topology(1, 2), ranks="processes") as llm,
        serving(llm) as url,
        connect(url) as client,
    ):
        assert complete(client, max_tokens=2).usage.completion_tokens == 2
        os.kill(llm.engine.ranks.pids[1], signal.SIGKILL)
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="engine failed"):
            complete(client)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "rank 1 (node 0, card 1) on " in said and "SIGKILL" in said
