"""Outputs in OpenAI's form: chunks add up to the whole, whatever they are cut into."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import Output
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.llm import demo_model
from expertmesh.request import FinishReason
from expertmesh.server.chat.template import ChatTemplate
from expertmesh.server.openai.answer import ChatAnswer, ChoicesAnswer, CompletionAnswer
from expertmesh.server.openai.schema import ChatRequest, CompletionRequest
from expertmesh.server.service import Opened

TEXT = "Once upon a time 春眠不觉晓🙂 there was"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model(), 8192)


def outputs_of(tokenizer: Tokenizer, text: str) -> list[Output]:
    """An output after each token of the text, with reports that name the token and token 5."""
    ids = tokenizer.encode(text, special=False)
    stream, so_far, found = tokenizer.stream(), "", []
    for count, token in enumerate(ids, 1):
        so_far += stream.push(token)
        reports = [{5: -0.5} | {i: -float(n) - 1} for n, i in enumerate(ids[:count])]
        prompt: dict[str, Any] = {"prompt_token_ids": [0, 300], "prompt_logprobs": [None, {300: -7.0}]}
        reason: FinishReason | None = "stop" if count == len(ids) else None
        found.append(
            Output(
                "r",
                None,
                text=so_far,
                token_ids=ids[:count],
                finish_reason=reason,
                logprobs=reports,
                **prompt,
            )
        )
    return found


def completion(tokenizer: Tokenizer, **fields: Any) -> CompletionAnswer:
    request = CompletionRequest.model_validate({"model": "m", "prompt": [0, 300], "logprobs": 1} | fields)
    return CompletionAnswer(request, "m", tokenizer)


def chat(tokenizer: Tokenizer, **fields: Any) -> ChatAnswer:
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "m", "messages": messages, "logprobs": True, "top_logprobs": 1}
    request = ChatRequest.model_validate(body | fields)
    opened = Opened([], None, None, request.asked(), ChatTemplate(tokenizer))
    return ChatAnswer(request, "m", tokenizer, opened)


def chunks_of(answer: ChoicesAnswer, outputs: list[Output], read: list[bool]) -> list[dict[str, Any]]:
    """Choices of the chunks where a reader meets some of the outputs, and the last one."""
    met = [o for o, seen in zip(outputs, read, strict=True) if seen or o.finished]
    return [chunk["choices"][0] for output in met for chunk in answer.more(0, output)]


@given(data=st.data())
def test_completion_chunks_add_up_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    outputs = outputs_of(tokenizer, TEXT)
    fields = {"echo": data.draw(st.booleans()), "logprobs": data.draw(st.sampled_from([None, 0, 1]))}
    read = data.draw(st.lists(st.booleans(), min_size=len(outputs), max_size=len(outputs)))
    whole = completion(tokenizer, **fields).whole({0: outputs[-1]})["choices"][0]
    chunks = chunks_of(completion(tokenizer, stream=True, **fields), outputs, read)
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    for name, values in (whole["logprobs"] or {}).items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


@given(data=st.data())
def test_chat_chunks_add_up_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    outputs = outputs_of(tokenizer, TEXT)
    read = data.draw(st.lists(st.booleans(), min_size=len(outputs), max_size=len(outputs)))
    whole = chat(tokenizer).whole({0: outputs[-1]})["choices"][0]
    chunks = chunks_of(chat(tokenizer, stream=True), outputs, read)
    assert (
        "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"] == TEXT
    )
    assert [e for chunk in chunks for e in chunk["logprobs"]["content"]] == whole["logprobs"]["content"]


def test_offsets_are_where_the_text_of_a_token_begins(tokenizer: Tokenizer) -> None:
    for echo in (False, True):
        choice = completion(tokenizer, echo=echo).whole({0: outputs_of(tokenizer, TEXT)[-1]})["choices"][0]
        logprobs = choice["logprobs"]
        tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
        for token, offset in zip(tokens, offsets, strict=True):
            if "\ufffd" not in token and not token.startswith("<｜"):
                assert choice["text"][offset:].startswith(token)
        assert offsets == sorted(offsets)


def test_reports_of_a_completion(tokenizer: Tokenizer) -> None:
    output = outputs_of(tokenizer, "Once upon")[-1]
    logprobs = completion(tokenizer, echo=True).whole({0: output})["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][:3] == [None, -7.0, -1.0]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][2] == {logprobs["tokens"][2]: -1.0, tokenizer.token_text(5): -0.5}


def test_reports_of_a_chat(tokenizer: Tokenizer) -> None:
    output = outputs_of(tokenizer, "🙂")[-1]
    entries = chat(tokenizer).whole({0: output})["choices"][0]["logprobs"]["content"]
    assert all(entry["bytes"] is None for entry in entries), "parts of a character have no text of their own"
    first = entries[0]["top_logprobs"]
    text = tokenizer.token_text(5)
    assert first == [{"token": text, "logprob": -0.5, "bytes": list(text.encode())}]


def test_infinity_does_not_reach_json(tokenizer: Tokenizer) -> None:
    output = Output("r", None, [1], "!", [5], "length", [{5: float("-inf")}])
    assert completion(tokenizer).whole({0: output})["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_usage_counts_every_prompt_once(tokenizer: Tokenizer) -> None:
    output = outputs_of(tokenizer, "Once")[-1]
    count = len(output.token_ids)
    answer = completion(tokenizer, n=2, stream=True, stream_options={"include_usage": True})
    for number in (3, 0, 1, 2):
        assert answer.more(number, output)[0]["usage"] is None
    (last,) = answer.closing()
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4 * count,
        "total_tokens": 4 + 4 * count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
