"""What is new of requests, on its way from the engine to whoever makes texts of it."""

from typing import Any, cast

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.engine.text import Outputs, OutputText
from expertmesh.engine.tokenizer import TextStream, Tokenizer
from expertmesh.request import Output, Request, SamplingParams
from expertmesh.server.frames import TokenWriter, plain_params
from expertmesh.server.growing import Growing, Job, View

WORDS = ["a", "b", "ab", "", "c a"]


class Words:
    """A tokenizer of a few words, and the stream of its tokens."""

    def stream(self) -> TextStream:
        return cast(TextStream, self)

    def push(self, token: int) -> str:
        return WORDS[token % len(WORDS)]

    def flush(self) -> str:
        return "b"


def sent(frame: Any) -> Any:
    """As it arrives."""
    return msgpack.unpackb(msgpack.packb(frame), strict_map_key=False)


@given(st.data())
def test_texts_made_elsewhere_are_those_of_the_engine(data: st.DataObject) -> None:
    """Also where several steps come at once, and where reports on tokens are asked for."""
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    stop = data.draw(st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2))
    end = data.draw(st.sampled_from(["stop", "length"]))
    reports = data.draw(st.sampled_from([None, 0]))
    params = SamplingParams(stop=tuple(stop), logprobs=reports, prompt_logprobs=reports)
    request = Request("k", [7, 8], 2, params, seed=0, cached_tokens=1)
    request.prompt_logprobs = [None, {8: -1.0}]
    outputs, writer = Outputs(cast(Tokenizer, Words())), TokenWriter()
    outputs.expect(request, None)
    growing = Growing("k", 0, Job([7, 8], params), OutputText(Words().stream(), params.stop))
    held: list[Any] = []
    expected: Output | None = None
    for number, token in enumerate(tokens):
        request.tokens.append(token)
        if reports is not None:
            request.logprobs.append({token: -0.5})
        request.finish_reason = end if number == len(tokens) - 1 else None  # type: ignore[assignment]
        if expected is None or not expected.finished:
            expected = outputs.of(request)
        held.append(request)
        if number == len(tokens) - 1 or data.draw(st.booleans()):
            (news,) = sent(writer.write(held[-1:]))["new"].values()
            if growing.reason is None:
                stopped = growing.take(news)
                assert stopped == (growing.reason is not None and request.finish_reason is None)
    found = growing.output()
    assert expected is not None and expected.finished
    for name in ("text", "finish_reason", "cached_tokens", "prompt_token_ids"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("token_ids", "logprobs", "prompt_logprobs"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None) and list(one or ()) == list(other or ())


def test_only_what_is_new_is_sent() -> None:
    writer = TokenWriter()
    request = Request("k", [7, 8, 1], 2, SamplingParams(logprobs=0), seed=0)
    request.logprobs = [{1: -0.5}]
    assert writer.write([request])["new"] == {"k": [[1], [{1: -0.5}], None, 0, None]}
    request.tokens += [2, 3]
    request.logprobs += [{2: -1.0}, {3: -2.0}]
    request.finish_reason = "length"
    assert writer.write([request])["new"] == {"k": [[2, 3], [{2: -1.0}, {3: -2.0}], None, 0, "length"]}
    assert writer._told == {}


def test_the_wait_in_the_queue_is_told_once() -> None:
    writer = TokenWriter()
    one, other = (Request(key, [7, 1], 1, SamplingParams(), seed=0, queued=0.5) for key in "ab")
    assert writer.write([one])["waited"] == {"a": 0.5}
    frame = sent(writer.write([one, other]))
    assert frame["waited"] == {"b": 0.5} and frame["new"].keys() == {"a", "b"}


def test_a_request_without_an_output() -> None:
    request = Request("k", [7], 1, SamplingParams(max_tokens=0), seed=0, finish_reason="length")
    assert TokenWriter().write([request])["new"] == {"k": [[], None, None, 0, "length"]}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(
            max_tokens=1 << 62, seed=(1 << 63) + 127, top_k=5, stop=("a", "b"), stop_token_ids=(1, 2)
        ),
        SamplingParams(logprobs=0, prompt_logprobs=3, ignore_eos=True, temperature=0, min_p=0.5),
    ],
)
def test_sampling_parameters_arrive_as_they_are(params: SamplingParams) -> None:
    plain = plain_params(params)
    assert SamplingParams(**sent(plain)) == params
    assert len(plain) <= 5


@given(
    st.lists(st.integers()),
    st.lists(st.integers()),
    st.integers(-9, 9),
    st.integers(-9, 9),
    st.integers(1, 3),
)
def test_a_view_is_the_list_that_there_was(
    items: list[int], more: list[int], start: int, stop: int, step: int
) -> None:
    grown = list(items)
    view = View(grown)
    grown += more
    assert view == items and list(view) == items and len(view) == len(items) and repr(view) == repr(items)
    assert view[start:stop:step] == items[start:stop:step] and view[::-1] == items[::-1]
    assert (view == [*items, 1]) is False
    for index in (start, stop):
        if -len(items) <= index < len(items):
            assert view[index] == items[index]
        else:
            with pytest.raises(IndexError):
                view[index]
