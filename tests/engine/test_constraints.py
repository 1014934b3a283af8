"""Outputs under a grammar: jsonschema and Python's regular expressions judge what the models write, and nothing else of
an engine gets in the way."""

import itertools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import pytest

from expertmesh import LLM, InputError, Output, SamplingParams, Topology
from expertmesh.engine import constraints
from expertmesh.engine.grammar import compile_source
from tests.support.files import TINY, random_checkpoint, write_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["card", "node"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind"],
}
EOS = 1


def grammar(kind: str, **values: Any) -> str:
    return json.dumps({"type": kind, **values})


JSON = grammar("json_schema", schema=SCHEMA)
NUMBER = grammar("regex", pattern="[0-9]{3}-[a-f]{2,6}")


def params(text: str | None, seed: int = 0, **values: Any) -> SamplingParams:
    return SamplingParams(grammar=text, seed=seed, **({"max_tokens": 120} | values))


def is_valid(output: Output) -> bool:
    """Where it came to its end."""
    if output.finish_reason == "stop":
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(output.text))
    return output.finish_reason == "stop"


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(dtype="float32") as llm:
        yield llm


def test_both_models_write_what_a_schema_says(demo: LLM, tiny_llm: LLM) -> None:
    for llm in (demo, tiny_llm):
        outputs = llm.generate(["Once upon a time"] * 12, [params(JSON, seed) for seed in range(12)])
        assert sum(is_valid(output) for output in outputs) > 6
        assert len({output.text for output in outputs}) > 6


def test_both_models_write_what_a_regular_expression_says(demo: LLM, tiny_llm: LLM) -> None:
    for llm in (demo, tiny_llm):
        for output in llm.generate(["a", "春望\n杜甫\n"], params(NUMBER)):
            assert output.finish_reason == "stop" and re.fullmatch("[0-9]{3}-[a-f]{2,6}", output.text)
            assert output.token_ids[-1] in llm.engine.intake.eos


@pytest.mark.parametrize("seed", range(3))
def test_letters_of_several_tokens(tiny_llm: LLM, seed: int) -> None:
    """Each of them spans three or four tokens of this vocabulary."""
    (output,) = tiny_llm.generate("x", params(grammar("regex", pattern="[你好世界]{2}[😀-😆]{2}"), seed))
    assert re.fullmatch("[你好世界]{2}[😀-😆]{2}", output.text) and len(output.token_ids) == 15
    schema = {"type": "array", "prefixItems": [{"const": "你好😀"}], "minItems": 1, "items": False}
    (output,) = tiny_llm.generate("x", params(grammar("json_schema", schema=schema), seed))
    assert json.loads(output.text) == ["你好😀"]


X, Y = 91, 92  # letters of the tiny tokenizer


def mixed() -> list[SamplingParams]:
    """Some with a grammar, some without, in one batch."""
    choice = grammar("choice", choices=["yes", "no", "perhaps"])
    letters = {"allowed_token_ids": (X, Y), "bad_words": ("xy",), "min_tokens": 20}
    return [
        params(JSON, 1), params(None, 2, max_tokens=30), params(choice, 3, temperature=0), params(NUMBER, 4),
        params(NUMBER, 5, top_p=0.9), params(None, 6, max_tokens=9, logit_bias={9: 5.0}), params(choice, 7),
        params(None, 8, max_tokens=20, **letters),
    ]  # fmt: skip


def mixed_on(llm: LLM) -> list[tuple[list[int], str | None]]:
    outputs = llm.generate([[5, 6, 7, i] for i in range(8)], mixed())
    return [(output.token_ids, output.finish_reason) for output in outputs]


def test_a_request_is_the_same_alone_and_in_any_batch(tiny_llm: LLM) -> None:
    together = mixed_on(tiny_llm)
    letters = together[-1][0]
    assert set(letters) <= {X, Y} and (X, Y) not in itertools.pairwise(letters)
    for i, one in enumerate(mixed()):
        (alone,) = tiny_llm.generate([[5, 6, 7, i]], one)
        assert (alone.token_ids, alone.finish_reason) == together[i]


def test_preemption_and_cached_prefixes_change_nothing(tiny_folder: Path, tiny_llm: LLM) -> None:
    """Twice the same, so that the second time finds pages of the first."""
    long = grammar("regex", pattern="[a-z]{40}(你|好){9}")
    each = [params(long if seed % 2 else None, seed, max_tokens=80, min_tokens=60) for seed in range(4)]
    prompts = [[5, 6, 7, 8, 9, i] for i in range(4)]
    expected = [output.token_ids for output in tiny_llm.generate(prompts, each)]
    with LLM(tiny_folder, page_size=4, cache_tokens=160, max_context=128) as small:
        for _ in range(2):
            assert [output.token_ids for output in small.generate(prompts, each)] == expected
        assert small.engine.scheduler.preemptions > 0


@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_eight_ranks_choose_the_same_tokens(ranks: str, tiny_folder: Path, tiny_llm: LLM) -> None:
    topology = Topology(2, 4, 2)
    with LLM(tiny_folder, topology=topology, ranks=ranks, page_size=4, max_batch_requests=8) as llm:
        assert mixed_on(llm) == mixed_on(tiny_llm)


def test_max_tokens_cuts_in_the_middle(tiny_llm: LLM) -> None:
    (output,) = tiny_llm.generate("x", params(NUMBER, max_tokens=2))
    assert output.finish_reason == "length" and re.fullmatch("[0-9]{2}", output.text)
    (output,) = tiny_llm.generate("x", params(NUMBER, max_tokens=0))
    assert output.finish_reason == "length" and not output.token_ids


def test_a_finished_grammar_ends_also_where_eos_is_ignored(tiny_llm: LLM) -> None:
    pattern = grammar("regex", pattern="a{2,30}")
    (output,) = tiny_llm.generate("x", params(pattern, ignore_eos=True))
    assert output.text == "a" * 30 and output.finish_reason == "stop"


def test_stop_tokens_and_stop_texts_end_a_grammar_too(tiny_llm: LLM) -> None:
    pattern = grammar("regex", pattern="a{9}")
    (output,) = tiny_llm.generate("x", params(pattern, stop="aaa"))
    assert output.finish_reason == "stop" and output.text == ""
    tokenizer = tiny_llm.engine.intake.tokenizer
    assert tokenizer is not None
    (output,) = tiny_llm.generate("x", params(pattern, stop_token_ids=tokenizer.encode("a", special=False)))
    assert output.finish_reason == "stop" and len(output.token_ids) == 1


def test_min_tokens_keeps_a_grammar_going_where_it_can(tiny_llm: LLM) -> None:
    for seed in range(5):
        (output,) = tiny_llm.generate(
            "x", params(grammar("regex", pattern="a*"), seed, min_tokens=20, max_tokens=60)
        )
        assert len(output.text) >= 20
        (output,) = tiny_llm.generate("x", params(grammar("regex", pattern="aa"), seed, min_tokens=20))
        assert output.text == "aa" and output.finish_reason == "stop"


def test_logprobs_under_a_grammar_are_the_models_own(tiny_llm: LLM) -> None:
    (free,) = tiny_llm.generate([[5, 6, 7]], params(None, logprobs=280, max_tokens=1))
    (bound,) = tiny_llm.generate([[5, 6, 7]], params(NUMBER, logprobs=280, max_tokens=1))
    assert free.logprobs is not None and free.logprobs == bound.logprobs


def test_the_constraint_begins_after_a_text(tiny_llm: LLM) -> None:
    """Which the model writes by itself or, here, is made to."""
    text = grammar("choice", choices=["yes"], after="the")
    tokenizer = tiny_llm.engine.intake.tokenizer
    assert tokenizer is not None
    word = tokenizer.encode("the", special=False)[-1]
    for seed in range(4):
        bias = {word: 8.0, EOS: -100.0}
        (output,) = tiny_llm.generate("x", params(text, seed, logit_bias=bias, temperature=2.0))
        before, found, rest = output.text.partition("the")
        assert found and rest == "yes" and output.finish_reason == "stop", before


def test_a_text_that_spans_tokens_is_found() -> None:
    pieces = [b"<", b"/th", b"in", b"k>x", "你".encode(), b"think>"]
    utf8 = constraints.Utf8(pieces)
    for tokens, begun in (
        ([0, 1, 2, 3], True),
        ([0, 0, 1, 2, 3], True),
        ([0, 1, 2, 4], False),
        ([0, 5], False),
    ):
        matcher = mock.Mock()
        follower = constraints.Follower(matcher, utf8, pieces, b"</think>", 2)
        follower.advance([0, 0])
        for count in range(len(tokens) + 1):
            follower.advance([0, 0, *tokens[:count]])
        assert follower.begun == begun
        assert not matcher.accept_token.called


def test_special_tokens_are_no_text(tiny_llm: LLM) -> None:
    """They are not shown, so a grammar that spells one out gets letters."""
    (output,) = tiny_llm.generate("x", params(grammar("choice", choices=["<eos>"])))
    assert output.text == "<eos>" and len(output.token_ids) == 6


def test_others_go_on_while_a_grammar_is_compiled(tiny_llm: LLM) -> None:
    gate, engine = threading.Event(), tiny_llm.engine

    def slowly(*args: Any) -> Any:
        assert gate.wait(60)
        return compile_source(*args)

    with mock.patch.object(constraints, "compile_source", slowly):
        held = engine.submit([5, 6], params(grammar("regex", pattern="b{3}"), max_tokens=9))
        gone = engine.submit([5, 6], params(grammar("regex", pattern="c{3}"), max_tokens=9))
        free = engine.submit([5, 6], params(None, max_tokens=3, ignore_eos=True))
        while free.finish_reason is None:
            engine.step()
        assert engine.step() == [] and engine.busy and held.output_length == 0
        engine.abort(gone.id)
        gate.set()
        while engine.busy:
            engine.step()
    assert held.finish_reason == "stop" and gone.finish_reason == "abort" and held.output_length == 4
    assert not engine.constraints._waiting and engine.scheduler.pages_held == 0


def test_a_grammar_that_fails_late_ends_its_request_alone(
    tiny_llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch.object(constraints, "compile_source", side_effect=MemoryError("too large")):
        bad, good = tiny_llm.generate(
            ["x", "x"], [params(NUMBER), params(None, max_tokens=3, ignore_eos=True)]
        )
    assert bad.finish_reason == "abort" and "too large" in caplog.text
    assert len(good.token_ids) == 3


def test_a_grammar_without_a_way_on_ends(tiny_llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    (output,) = tiny_llm.generate("x", params(grammar("ebnf", grammar='root ::= "a" root'), max_tokens=5))
    assert output.text == "aaaaa" and output.finish_reason == "length"
    (output,) = tiny_llm.generate("x", params(grammar("ebnf", grammar="root ::= root"), max_tokens=5))
    assert output.text == "" and output.finish_reason == "stop" and "ends early" in caplog.text


def test_a_broken_grammar_is_refused_before_anything_is_queued(tiny_llm: LLM) -> None:
    with pytest.raises(InputError, match=r"^grammar"):
        tiny_llm.generate(["x", "y"], [params(None), params(grammar("regex", pattern="("))])
    assert not tiny_llm.engine.busy


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, TINY)
    with LLM(tmp_path) as llm:
        for values in ({"grammar": NUMBER}, {"bad_words": ("a",)}):
            with pytest.raises(InputError, match=f"^{next(iter(values))} need.* tokenizer"):
                llm.generate([[5]], SamplingParams(**values))  # type: ignore[arg-type]
    write_tokenizer(tmp_path, eos_token=None)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"eos_token_id": None}))
    with LLM(tmp_path) as llm, pytest.raises(InputError, match=r"^grammar needs an end-of-text token"):
        llm.generate([[5]], SamplingParams(grammar=NUMBER))


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids"])
def test_tokens_outside_the_vocabulary_are_refused(name: str, tiny_llm: LLM) -> None:
    with pytest.raises(InputError, match=f"^{name} has token 280"):
        tiny_llm.generate("x", SamplingParams(**{name: {280: 1.0} if name == "logit_bias" else [280]}))  # type: ignore[arg-type]


def test_no_end_before_min_tokens(tiny_llm: LLM) -> None:
    """Ends are all but certain otherwise."""
    bias = {EOS: 100.0, 9: 50.0}
    (output,) = tiny_llm.generate("x", params(None, logit_bias=bias, min_tokens=7, max_tokens=20))
    assert output.token_ids == [9] * 7 + [EOS] and output.finish_reason == "stop"
    (output,) = tiny_llm.generate("x", params(None, logit_bias=bias, min_tokens=3, stop_token_ids=(9,)))
    assert not {EOS, 9} & set(output.token_ids[:3]) and output.token_ids[3:] == [EOS]


def test_bad_words_are_not_written(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.engine.intake.tokenizer
    assert tokenizer is not None
    letters = dict.fromkeys(tokenizer.encode("xyz", special=False), 60.0)
    words = ("xy", " z")
    for seed in range(4):
        one = params(None, seed, max_tokens=60, logit_bias=letters, bad_words=words)
        (output,) = tiny_llm.generate("q", one)
        assert set(output.text) == {"x", "y"} and "xy" not in output.text


def test_only_allowed_tokens_are_chosen(tiny_llm: LLM) -> None:
    (output,) = tiny_llm.generate("q", params(None, max_tokens=40, allowed_token_ids=(30, 31, 32)))
    assert set(output.token_ids) <= {30, 31, 32} and output.finish_reason == "length"
