"""The step loop: requests come and go in any order, and what happens to one is never seen by the others."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from expertmesh import EngineConfig, InputError, Output, SamplingParams
from expertmesh.engine.engine import Engine
from expertmesh.engine.plan import Plan
from expertmesh.request import Batch, Sampled, StepResult
from tests.support.files import TINY, random_tensors, write_tokenizer
from tests.support.oracle import logits_of
from tests.support.reference import TOLERANCE, prompts_for

Alone: TypeAlias = Callable[[Sequence[int]], Output]
NewEngine: TypeAlias = Callable[..., Engine]
Report: TypeAlias = dict[int, float] | None
VOCABULARY = TINY["vocab_size"]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPTS = prompts_for(VOCABULARY, (1, 2, 3, 5, 9, 14, 14, 20), seed=4)
PROMPTS[5][:12] = PROMPTS[7][:12]  # a beginning that both have


def engine_of(folder: Path, **options: Any) -> Engine:
    return Engine(folder, EngineConfig(page_size=4, **options))


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 8, "temperature": 0, "ignore_eos": True} | changes))


def run(engine: Engine) -> dict[str, Output]:
    """Step to the end; the last output of each request."""
    last: dict[str, Output] = {}
    for _ in range(1000):
        if not engine.busy:
            return last
        last |= {output.request_id: output for output in engine.step()}
    raise AssertionError("it does not end")


def run_one(engine: Engine, tokens: Sequence[int], given: SamplingParams) -> Output:
    request = engine.submit(tokens, given)
    return run(engine)[request.id]


def state(engine: Engine) -> list[Any]:
    """Who is there, how far, and who holds which pages."""
    (s,), outputs = engine.scheduler.schedulers, engine._outputs
    requests = [(r.id, list(r.tokens), list(r.pages), r.computed) for r in [*s.running, *s.waiting]]
    tables = [list(table) for table in (engine._requests, outputs._texts, outputs._prompts)]
    return [requests, *tables, len(s.running), s.cache.pages - s.cache.free]


def nothing_left(engine: Engine) -> bool:
    return state(engine) == [[], [], [], [], 0, 0]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return engine_of(tiny_folder)


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Engine:
    """Two requests at a time, prompts in pieces, and not enough pages for both at full length."""
    return engine_of(tiny_folder, max_batch_requests=2, chunk=4, cache_tokens=40)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> Alone:
    """What 32 tokens a prompt is followed by when nobody else is there and nothing is kept."""
    engine, known = engine_of(tiny_folder, prefix_cache=False), dict[tuple[int, ...], Output]()
    every = params(max_tokens=32, logprobs=2, prompt_logprobs=0)

    def get(tokens: Sequence[int]) -> Output:
        key = tuple(tokens)
        if key not in known:
            known[key] = output = run_one(engine, tokens, every)
            first_two = [sorted(report.values(), reverse=True)[:2] for report in output.logprobs or ()]
            assert min(a - b for a, b in first_two) > 1e-3, "choose other prompts: this is up to rounding"
        return known[key]

    return get


@pytest.fixture
def new_engine(tiny_folder: Path, tmp_path: Path) -> NewEngine:
    """The tiny model again, with other files around it."""

    def make(
        config: dict[str, Any] | None = None,
        generation: object = None,
        tokenizer: dict[str, Any] | None = None,
        text: bool = True,
    ) -> Engine:
        (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(TINY | (config or {})))
        if generation is not None:
            content = generation if isinstance(generation, str) else json.dumps(generation)
            (tmp_path / "generation_config.json").write_text(content)
        if text:
            write_tokenizer(tmp_path, **(tokenizer or {}))
        return engine_of(tmp_path)

    return make


# --- what is refused

REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "empty": ([], {}, "the prompt is empty"),
    "negative": ([3, -1], {}, "token id -1 is outside the vocabulary of 280"),
    "beyond": ([3, 280], {}, "token id 280 is outside the vocabulary of 280"),
    "text": (["a"], {}, "token id 'a' is outside"),
    "fraction": ([1.0], {}, r"token id 1\.0 is outside"),
    "no_room_for_output": ([1] * 40, {}, "the prompt has 40 tokens, but the context holds 40"),
    "too_long": ([1] * 41, {"max_tokens": 0}, "the prompt has 41 tokens"),
    "logprobs": ([1], {"logprobs": 281}, "^logprobs is more than the vocabulary of 280"),
    "prompt_logprobs": ([1], {"prompt_logprobs": 281}, "prompt_logprobs is more than the vocabulary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_changes_nothing(small: Engine, alone: Alone, case: str) -> None:
    tokens, changes, words = REFUSED[case]
    for number in (3, 4, 5):  # the last one waits
        small.submit(PROMPTS[number], GREEDY, str(number))
    small.step()
    before = state(small)
    for attempt in (small.check, small.submit):
        with pytest.raises(InputError, match=words):
            attempt(tokens, params(**changes))
        assert state(small) == before
    for key, output in run(small).items():
        assert output.token_ids == alone(PROMPTS[int(key)]).token_ids[:8]
    assert nothing_left(small)


def test_an_id_is_in_use_until_its_request_ends(engine: Engine, alone: Alone) -> None:
    engine.submit(PROMPTS[3], GREEDY, "a", "the first")
    before = state(engine)
    with pytest.raises(InputError, match="request id 'a' is in use"):
        engine.submit(PROMPTS[4], GREEDY, "a", "the second")
    assert state(engine) == before
    assert (output := run(engine)["a"]).token_ids == alone(PROMPTS[3]).token_ids[:8]
    assert output.prompt == "the first"
    engine.submit(PROMPTS[4], GREEDY, "a")
    engine.abort("a")
    engine.submit(PROMPTS[4], GREEDY, "a")
    assert run(engine)["a"].token_ids == alone(PROMPTS[4]).token_ids[:8]


def test_ids_of_its_own_differ(engine: Engine) -> None:
    requests = [engine.submit([1], GREEDY) for _ in range(3)]
    assert len({request.id for request in requests}) == 3 == len(run(engine))


def test_stop_texts_need_a_tokenizer(new_engine: NewEngine) -> None:
    engine = new_engine(text=False)
    with pytest.raises(InputError, match=r"stop texts need a tokenizer.*use stop_token_ids"):
        engine.submit([3], params(stop="a"))
    assert nothing_left(engine)


def test_a_tokenizer_of_another_model_is_refused(new_engine: NewEngine) -> None:
    with pytest.raises(InputError, match="do not belong together"):
        new_engine({"vocab_size": 200})


# --- abort


@pytest.mark.parametrize("steps", range(10))
def test_abort_at_any_moment_gives_back_all_pages(small: Engine, alone: Alone, steps: int) -> None:
    """Waiting, in the middle of its prompt, while it writes, after it has ended."""
    for victim in ("3", "5", "7"):
        for number in (3, 5, 7):
            small.submit(PROMPTS[number], GREEDY, str(number))
        last = {output.request_id: output for _ in range(steps) for output in small.step()}
        small.abort(victim)
        small.abort(victim)
        assert victim not in str([request[0] for request in state(small)[0]])
        held = {page for request in state(small)[0] for page in request[2]}
        assert state(small)[-1] == len(held)
        for key, output in (last | run(small)).items():
            expected = alone(PROMPTS[int(key)]).token_ids[:8]
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason == "length" or key == victim
        assert nothing_left(small)


def test_abort_of_nobody(engine: Engine) -> None:
    engine.submit([1], GREEDY, "a")
    before = state(engine)
    engine.abort("b")
    assert state(engine) == before
    run(engine)


def test_abort_of_one_leaves_the_pages_that_another_shares(engine: Engine, alone: Alone) -> None:
    run_one(engine, PROMPTS[7], GREEDY)
    for name in "ab":
        engine.submit(PROMPTS[7], GREEDY, name)
    engine.step()
    a, b = (engine._requests[name] for name in "ab")
    assert len(set(a.pages) & set(b.pages)) == 4
    engine.abort("a")
    assert (output := run(engine)["b"]).token_ids == alone(PROMPTS[7]).token_ids[:8]
    assert output.cached_tokens == 16 and nothing_left(engine)


def test_abort_during_a_step(engine: Engine, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.ranks.run

    def run_and_abort(batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        results = real(batches, plan)
        engine.abort("a")
        return results

    engine.submit(PROMPTS[3], GREEDY, "a")
    engine.submit(PROMPTS[4], GREEDY, "b")
    monkeypatch.setattr(engine.ranks, "run", run_and_abort)
    assert [output.request_id for output in engine.step()] == ["b"]
    assert run(engine)["b"].token_ids == alone(PROMPTS[4]).token_ids[:8] and nothing_left(engine)


def test_after_a_step_that_fails_requests_can_be_aborted_or_go_on(
    engine: Engine, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        raise RuntimeError("broken on purpose")

    engine.submit(PROMPTS[3], GREEDY, "a")
    engine.submit(PROMPTS[4], GREEDY, "b")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        patch.setattr(engine.ranks, "run", fail)
        engine.step()
    engine.abort("a")
    assert run(engine)["b"].token_ids == alone(PROMPTS[4]).token_ids[:8] and nothing_left(engine)


# --- ends by tokens


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation": {"eos_token_id": 7}, "config": {"eos_token_id": 9}}, {7, 1}),
        ({"generation": {"eos_token_id": [7, 8]}, "config": {"eos_token_id": 9}}, {7, 8, 1}),
        ({"generation": {"temperature": 1.0}, "config": {"eos_token_id": 9}}, {9, 1}),
        ({"generation": {"eos_token_id": None}, "config": {"eos_token_id": [9, 10]}}, {9, 10, 1}),
        ({"config": {"eos_token_id": 0}}, {0, 1}),
        ({"config": {"eos_token_id": None}, "tokenizer": {"eos_token": {"content": "the"}}}, {261}),
        ({"config": {"eos_token_id": None}, "tokenizer": {"eos_token": None}}, set()),
        ({"config": {"eos_token_id": 9}, "text": False}, {9}),
    ],
)
def test_who_says_what_ends_a_text(new_engine: NewEngine, files: dict[str, Any], expected: set[int]) -> None:
    """generation_config.json, where it is silent config.json, and the tokenizer in any case."""
    assert new_engine(**files).intake.eos == expected


def first_seen_at(tokens: Sequence[int], index: int) -> int:
    """The token at this place, which must be its first one."""
    assert tokens[index] not in tokens[:index], "choose another prompt"
    return tokens[index]


@pytest.mark.parametrize("source", ["generation", "config", "tokenizer"])
def test_end_of_text_is_the_last_token_and_no_text(
    new_engine: NewEngine, alone: Alone, tiny_folder: Path, source: str
) -> None:
    rust = RustTokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    expected = alone(PROMPTS[4]).token_ids
    stop = first_seen_at(expected, 3)
    value = {"eos_token": rust.id_to_token(stop)} if source == "tokenizer" else {"eos_token_id": stop}
    engine = new_engine(**{source: value})
    output = run_one(engine, PROMPTS[4], params(ignore_eos=False))
    assert (output.token_ids, output.finish_reason) == (expected[:4], "stop")
    assert output.text == rust.decode(expected[:3], skip_special_tokens=True)
    ignored = run_one(engine, PROMPTS[4], params(ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == (expected[:8], "length")
    assert nothing_left(engine)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_hold_whatever_is_said_of_eos(engine: Engine, alone: Alone, ignore_eos: bool) -> None:
    expected = alone(PROMPTS[4]).token_ids
    stop = (first_seen_at(expected, 5), first_seen_at(expected, 2))
    output = run_one(engine, PROMPTS[4], params(ignore_eos=ignore_eos, stop_token_ids=stop))
    assert (output.token_ids, output.finish_reason) == (expected[:3], "stop")


# --- ends by texts


class Scripted:
    """An engine whose model says given tokens."""

    def __init__(self, folder: Path) -> None:
        self.engine = engine_of(folder)
        self.tokens: list[int] = []
        self.engine.ranks.run = self.run  # type: ignore[method-assign]

    def run(self, batches: Sequence[Batch], plan: Plan) -> list[StepResult]:
        requests = [part.request for part in batches[0].slices if part.samples]
        return [StepResult({r.id: Sampled(self.tokens[r.output_length]) for r in requests})]

    def say(self, text: str, given: SamplingParams) -> list[Output]:
        assert self.engine.intake.tokenizer is not None
        self.tokens = self.engine.intake.tokenizer.encode(text, special=False)
        self.engine.submit([1, 2, 3], given)
        outputs = [output for _ in self.tokens for output in self.engine.step()]
        assert nothing_left(self.engine)
        return outputs


@pytest.fixture(scope="module")
def scripted(tiny_folder: Path) -> Scripted:
    return Scripted(tiny_folder)


def test_a_stop_text_that_spans_tokens(scripted: Scripted) -> None:
    """Tokens a, space, st, op, comma: its beginning is held back until it is known what comes of it."""
    *_, last = outputs = scripted.say("a stop, the thing", params(stop=("nothing", "stop,"), max_tokens=9))
    assert [output.delta for output in outputs] == ["a", " ", "", "", ""]
    assert (last.text, last.finish_reason, len(last.token_ids)) == ("a ", "stop", 5)


def test_what_only_began_like_a_stop_text_is_text(scripted: Scripted) -> None:
    *_, last = outputs = scripted.say("a stop the stop", params(stop="stop,", max_tokens=9))
    assert [output.delta for output in outputs] == ["a", " ", "", "", "stop ", "the", " ", "", "stop"]
    assert (last.text, last.finish_reason) == ("a stop the stop", "length")


@pytest.mark.parametrize(("stop", "max_tokens"), [("op", 4), ("p", 4), ("stop", 4), ("a", 1)])
def test_a_stop_text_in_the_last_token_is_a_stop(scripted: Scripted, stop: str, max_tokens: int) -> None:
    *_, last = scripted.say("a stop", params(stop=stop, max_tokens=max_tokens))
    assert (last.text, last.finish_reason) == ("a stop".partition(stop)[0], "stop")


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_characters_that_span_tokens_come_whole(scripted: Scripted, stop: tuple[str, ...]) -> None:
    *_, last = outputs = scripted.say("ü春", params(stop=stop, max_tokens=5))
    assert [output.delta for output in outputs] == ["", "ü", "", "", "春"] and last.text == "ü春"


def test_a_character_that_never_ends_is_replaced(scripted: Scripted) -> None:
    *_, last = outputs = scripted.say("ü春", params(max_tokens=4))
    assert [output.delta for output in outputs[:3]] == ["", "ü", ""]
    assert last.text == "ü\N{REPLACEMENT CHARACTER}" == "".join(output.delta for output in outputs)


words = st.text("thestopin ", min_size=1, max_size=12)


@given(words, st.lists(st.text("thestopin ", min_size=1, max_size=4), max_size=3), st.integers(1, 12))
def test_stop_texts(scripted: Scripted, text: str, stops: list[str], max_tokens: int) -> None:
    """Against a search of the whole text after every token."""
    assert scripted.engine.intake.tokenizer is not None
    tokens = scripted.engine.intake.tokenizer.encode(text, special=False)
    pieces = [scripted.engine.intake.tokenizer.token_text(token) for token in tokens][:max_tokens]
    expected, reason = "".join(pieces), "length"
    for count in range(len(pieces), 0, -1):
        so_far = "".join(pieces[:count])
        cuts = [so_far.index(stop) for stop in stops if stop in so_far]
        if cuts:
            expected, reason = so_far[: min(cuts)], "stop"
    outputs = scripted.say(text, params(max_tokens=len(pieces), stop=tuple(stops)))
    assert (outputs[-1].text, outputs[-1].finish_reason) == (expected, reason)
    grown = ""
    for output in outputs:
        grown += output.delta
        assert output.text == grown and expected.startswith(grown), "text was taken back"


# --- ends by length


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("number", [0, 7])
def test_max_tokens_0_reports_on_the_prompt(tiny_folder: Path, number: int, chunk: int | None) -> None:
    prompt, engine = PROMPTS[number], engine_of(tiny_folder, chunk=chunk)
    output = run_one(engine, prompt, params(max_tokens=0, logprobs=1, prompt_logprobs=VOCABULARY))
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
    assert output.logprobs == [] and nothing_left(engine)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    first, *reports = output.prompt_logprobs
    assert first is None
    weights = {name: tensor.double().numpy() for name, tensor in random_tensors(TINY).items()}
    logits, _ = logits_of(TINY, weights, prompt)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, report in enumerate(reports):
        assert report is not None
        found = [report[token] for token in range(VOCABULARY)]
        np.testing.assert_allclose(found, expected[row], atol=TOLERANCE, rtol=0)


def test_output_ends_where_the_context_does(tiny_folder: Path, alone: Alone) -> None:
    engine = engine_of(tiny_folder, max_context=17)
    output = run_one(engine, PROMPTS[4], params(max_tokens=50))
    assert (output.token_ids, output.finish_reason) == (alone(PROMPTS[4]).token_ids[:8], "length")
    whole = run_one(engine, [1] * 17, params(max_tokens=0))
    assert (whole.token_ids, whole.finish_reason) == ([], "length")
    with pytest.raises(InputError, match="the context holds 17"):
        engine.submit([1] * 17, params(max_tokens=1))


def test_the_context_is_no_larger_than_the_cache(tiny_folder: Path) -> None:
    engine = engine_of(tiny_folder, cache_tokens=10)
    assert (engine.config.cache_tokens, engine.config.max_context) == (12, 12)
    assert len(run_one(engine, PROMPTS[4], params(max_tokens=50)).token_ids) == 3


# --- what the checkpoint recommends

RECOMMENDED = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("generation", "changes", "expected"),
    [
        (None, {}, {}),
        ({}, {}, {}),
        (RECOMMENDED, {}, RECOMMENDED),
        (RECOMMENDED, {"top_k": 3, "temperature": 0}, RECOMMENDED | {"top_k": 3, "temperature": 0}),
        (RECOMMENDED, {"top_k": None}, RECOMMENDED),
        (RECOMMENDED | {"max_length": 20, "bos_token_id": 0, "do_sample": True}, {}, RECOMMENDED),
        ({"temperature": None, "top_p": 0.5}, {}, {"top_p": 0.5}),
        ({"do_sample": False}, {}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.6}, {"seed": 3}, {"temperature": 0, "seed": 3}),
        ({"do_sample": False}, {"temperature": 0.5}, {"temperature": 0.5}),
    ],
)
def test_defaults(
    new_engine: NewEngine, generation: object, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert new_engine(generation=generation).intake.default_params(**changes) == SamplingParams(**expected)


def test_recommendations_that_cannot_be_used(new_engine: NewEngine) -> None:
    with pytest.raises(InputError, match="top_p is 2, but must be a number from 0 to 1"):
        new_engine(generation={"top_p": 2}).intake.default_params()


def test_recommendations_that_cannot_be_read(new_engine: NewEngine) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json: not valid JSON"):
        new_engine(generation="{")


# --- everything at once

STOPS = (78, 261)
# Prompt, max_tokens, whether it has stop tokens, whether it wants to know about its prompt.
submits = st.tuples(
    st.sampled_from([3, 0, 2, 5, 1, 7, 4, 5, 6]), st.sampled_from([32, 0, 32, 5, 32, 1]), st.booleans(), st.booleans()
)  # fmt: skip
operations = st.lists(
    submits | st.none() | submits | st.none() | submits | st.integers(0, 20), min_size=12, max_size=50
)
options = st.fixed_dictionaries(
    {
        "cache_tokens": st.sampled_from([24, 36, 24, 200]),
        "chunk": st.sampled_from([1, 5, None]),
        "max_batch_requests": st.integers(2, 5),
        "max_batch_tokens": st.integers(5, 30),
        "prefix_cache": st.booleans(),
    }
)


class Crowd:
    """Requests in one engine, and what came of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.submitted: list[tuple[int, int, bool, bool]] = []
        self.aborted: set[int] = set()
        self.last: dict[int, Output] = {}

    def submit(self, number: int, max_tokens: int, stops: bool, reports: bool) -> None:
        given = params(
            max_tokens=max_tokens, stop_token_ids=STOPS if stops else (), logprobs=0,
            prompt_logprobs=0 if reports else None,
        )  # fmt: skip
        self.engine.submit(PROMPTS[number], given, str(len(self.submitted)))
        self.submitted.append((number, max_tokens, stops, reports))

    def abort(self, victim: int) -> None:
        self.engine.abort(str(victim))
        if victim < len(self.submitted) and not (victim in self.last and self.last[victim].finished):
            self.aborted.add(victim)

    def step(self) -> None:
        for output in self.engine.step():
            number = int(output.request_id)
            before = self.last.get(number)
            assert number not in self.aborted and not (before and before.finished)
            assert output.text == (before.text if before else "") + output.delta
            assert output.token_ids[: len(output.token_ids) - 1] == (before.token_ids if before else [])
            self.last[number] = output

    def check(self, alone: Alone) -> None:
        finished = {number for number, output in self.last.items() if output.finished}
        assert not finished & self.aborted and finished | self.aborted == set(range(len(self.submitted)))
        for number, output in self.last.items():
            prompt, max_tokens, stops, reports = self.submitted[number]
            expected = alone(PROMPTS[prompt])
            room = min(max_tokens, (self.engine.config.max_context or 0) - len(PROMPTS[prompt]))
            ends = [i + 1 for i, t in enumerate(expected.token_ids[:room]) if stops and t in STOPS]
            count = len(output.token_ids) if number in self.aborted else ends[0] if ends else room
            assert output.token_ids == expected.token_ids[:count]
            assert number in self.aborted or output.finish_reason == ("stop" if ends else "length")
            check_reports(output.logprobs, (expected.logprobs or [])[:count])
            if reports:
                check_reports(output.prompt_logprobs, expected.prompt_logprobs or [])


def check_reports(given: Sequence[Report] | None, expected: Sequence[Report]) -> None:
    """The one log-probability of each report is that of the same token there."""
    assert given is not None and len(given) == len(expected)
    for report, known in zip(given, expected, strict=True):
        assert (report is None) == (known is None)
        for token, value in (report or {}).items():
            assert value == pytest.approx((known or {})[token], abs=TOLERANCE)


@given(options, operations)
@settings(max_examples=50)
def test_in_any_order_every_request_gets_what_it_gets_alone(
    tiny_folder: Path, alone: Alone, config: dict[str, Any], todo: list[tuple[int, int, bool, bool] | int | None]
) -> None:  # fmt: skip
    """A tuple is a request, a number aborts one, None is a step."""
    crowd = Crowd(engine_of(tiny_folder, **config))
    for operation in todo:
        if isinstance(operation, tuple):
            crowd.submit(*operation)
        elif operation is None:
            crowd.step()
        else:
            crowd.abort(operation % (len(crowd.submitted) + 1))  # the last of these does not exist
    for _ in range(5000):
        if crowd.engine.busy:
            crowd.step()
    assert nothing_left(crowd.engine)
    crowd.check(alone)


def test_a_truth_value_is_no_token(engine: Engine) -> None:
    with pytest.raises(InputError, match="token id True is outside the vocabulary"):
        engine.submit([5, True], GREEDY)
    assert nothing_left(engine)


def test_an_id_of_its_own_is_not_one_in_use(engine: Engine) -> None:
    for number in range(100):
        engine.submit([5], GREEDY, f"r{number + 50}")
    ids = [engine.submit([5], GREEDY).id for _ in range(60)]
    assert len(set(ids)) == 60
    for key in list(engine._requests):
        engine.abort(key)
    assert nothing_left(engine)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": [["x"]]}', "eos_token_id is"),
        ('{"eos_token_id": "1"}', "eos_token_id is"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not an object"),
    ],
)
def test_a_generation_config_that_cannot_be_used(
    content: str, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=rf"generation_config\.json: .*{message}"):
        engine_of(tmp_path)
