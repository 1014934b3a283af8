"""The library's front: what may be a prompt, whose output is whose, and that nothing is left behind."""

import gc
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from expertmesh import LLM, InputError, Output, SamplingParams
from expertmesh.llm import demo_model
from tests.support.files import TINY, write_tokenizer
from tests.support.reference import prompts_for

NewLLM: TypeAlias = Callable[..., LLM]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
IDS = prompts_for(TINY["vocab_size"], range(1, 13), seed=4)

# The ids by hand: 0 to 3 are <bos>, <eos>, <user> and <assistant>; 261 is "the", and "stop" is 264 and 265.
USER = [{"role": "user", "content": "the"}]
SYSTEM = [{"role": "system", "content": "the"}, {"role": "user", "content": "stop"}]
ANSWERED = [*USER, {"role": "assistant", "content": "the"}, {"role": "user", "content": "stop"}]
PROMPTS: dict[str, tuple[Any, list[int]]] = {
    "text": ("the", [0, 261]),
    "empty_text": ("", [0]),
    "special_text": ("<bos>the<eos>", [0, 261, 1]),
    "ids": ([5, 6, 7], [5, 6, 7]),
    "tuple": ((5, 6), [5, 6]),
    "one_id": ([9], [9]),
    "chat": (USER, [0, 2, 261, 3]),
    "chat_tuple": (tuple(USER), [0, 2, 261, 3]),
    "system": (SYSTEM, [0, 261, 2, 264, 265, 3]),
    "answered": (ANSWERED, [0, 2, 261, 3, 261, 1, 2, 264, 265, 3]),
}


@pytest.fixture
def new_llm(tiny_folder: Path, tmp_path: Path) -> NewLLM:
    """The tiny model again, with other files around it or with none."""

    def make(tokenizer: dict[str, Any] | None = None, generation: object = None, **options: Any) -> LLM:
        for name in ("model.safetensors", "config.json"):
            (tmp_path / name).symlink_to(tiny_folder / name)
        if tokenizer is not None:
            write_tokenizer(tmp_path, **tokenizer)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return LLM(tmp_path, page_size=4, **options)

    return make


def tokens(outputs: Sequence[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def alone(llm: LLM, prompts: Sequence[Any], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [tokens(llm.generate([prompt], params))[0] for prompt in prompts]


def idle(llm: LLM) -> bool:
    engine = llm.engine
    return not engine.busy and not engine.scheduler.pages_held and not engine._requests and not llm._inboxes


# --- prompts


@pytest.mark.parametrize("form", PROMPTS)
def test_one_prompt_of_each_form(tiny_llm: LLM, form: str) -> None:
    prompt, ids = PROMPTS[form]
    assert tiny_llm.tokens(prompt) == ids
    for given in (prompt, [prompt], (prompt,)):
        (output,) = tiny_llm.generate(given, GREEDY)
        assert output.prompt_token_ids == ids
        assert output.prompt == (prompt if isinstance(prompt, str) else None)
        assert tokens([output]) == alone(tiny_llm, [ids])


@pytest.mark.parametrize("kind", [str, int, dict])
def test_a_list_of_each_form(tiny_llm: LLM, kind: type) -> None:
    chosen = [(p, ids) for p, ids in PROMPTS.values() if isinstance(p if p == "" else p[0], kind)]
    assert len(chosen) > 2
    outputs = tiny_llm.generate([prompt for prompt, _ in chosen], GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [ids for _, ids in chosen]


def test_forms_may_be_mixed(tiny_llm: LLM) -> None:
    outputs = tiny_llm.generate([prompt for prompt, _ in PROMPTS.values()], GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [ids for _, ids in PROMPTS.values()]
    assert tokens(outputs) == alone(tiny_llm, [ids for _, ids in PROMPTS.values()])


def test_no_prompts(tiny_llm: LLM) -> None:
    assert tiny_llm.generate([], GREEDY) == [] == tiny_llm.generate([], [])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "the prompt is empty"),
        ([3, 280], "token id 280 is outside"),
        ([1] * 512, "the context holds 512"),
        ([{"content": "a"}], "must be an object with role and content"),
        ([{"role": "tool", "content": "a"}], "no such role: tool"),
    ],
)
def test_all_prompts_are_checked_before_the_first_runs(tiny_llm: LLM, bad: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        next(iter(tiny_llm.stream([[1, 2], bad], GREEDY)))
    assert idle(tiny_llm)


# --- whose output is whose


def test_outputs_come_in_the_order_of_the_prompts(tiny_llm: LLM) -> None:
    """Although the later ones end first, and some wait."""
    each = [SamplingParams(max_tokens=13 - i, temperature=0, ignore_eos=True) for i in range(12)]
    ends = [o.request_id.rpartition("-")[2] for o in tiny_llm.stream(IDS, each) if o.finished]
    assert ends[0] == "7" and ends.index("11") < ends.index("0")
    outputs = tiny_llm.generate(IDS, each)
    assert [output.prompt_token_ids for output in outputs] == IDS
    assert [len(output.token_ids) for output in outputs] == list(range(13, 1, -1))


def test_a_stream_grows_by_what_it_says(tiny_llm: LLM) -> None:
    texts, last = ["", ""], [0, 0]
    for output in tiny_llm.stream(["the", "stop"], GREEDY):
        number = int(output.request_id.rpartition("-")[2])
        texts[number] += output.delta
        last[number] += 1
        assert output.text == texts[number] and len(output.token_ids) == last[number]
        assert output.finished == (last[number] == 6)
    assert texts == [output.text for output in tiny_llm.generate(["the", "stop"], GREEDY)]
    assert last == [6, 6] and all(texts)


def test_params_for_all_or_one_each(tiny_llm: LLM) -> None:
    each = [GREEDY, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)]
    one, two = tokens(tiny_llm.generate(IDS[2:4], GREEDY))
    assert tokens(tiny_llm.generate(IDS[2:4], each)) == [one, two[:2]]
    assert tokens(tiny_llm.generate(IDS[2:4], tuple(reversed(each)))) == [one[:2], two]
    assert tokens(tiny_llm.generate(IDS[2], [GREEDY])) == [one]


@pytest.mark.parametrize(("prompts", "count"), [(1, 0), (1, 2), (2, 1), (2, 3), (0, 1)])
def test_params_of_another_number(tiny_llm: LLM, prompts: int, count: int) -> None:
    with pytest.raises(InputError, match=f"{prompts} prompts, but {count} sampling parameters"):
        tiny_llm.generate(IDS[:prompts], [GREEDY] * count)
    assert idle(tiny_llm)


def test_without_params_the_checkpoint_decides(new_llm: NewLLM, tiny_llm: LLM) -> None:
    llm = new_llm(generation={"do_sample": False, "eos_token_id": TINY["eos_token_id"]})
    assert llm.default_params(max_tokens=3) == SamplingParams(max_tokens=3, temperature=0)
    greedy = SamplingParams(temperature=0)
    assert tokens(llm.generate(IDS[5])) == tokens(tiny_llm.generate(IDS[5], greedy))


# --- several calls at a time


def test_streams_may_be_nested(tiny_llm: LLM) -> None:
    """The inner calls take steps for the outer one too, and end it before it is read to the end."""
    expected = alone(tiny_llm, IDS[:4])
    outer: dict[str, list[list[int]]] = {}
    for output in tiny_llm.stream(IDS[:2], GREEDY):
        outer.setdefault(output.request_id[-1], []).append(output.token_ids)
        for count, inner in enumerate(tiny_llm.stream(IDS[2], GREEDY)):
            assert tokens(tiny_llm.generate(IDS[3], GREEDY)) == expected[3:]
            assert inner.token_ids == expected[2][: count + 1]
    assert outer == {str(i): [ids[: n + 1] for n in range(6)] for i, ids in enumerate(expected[:2])}
    assert idle(tiny_llm)


def test_streams_may_take_turns(tiny_llm: LLM) -> None:
    streams = [tiny_llm.stream(prompt, GREEDY) for prompt in IDS[:4]]
    *_, last = zip(*streams, strict=True)
    assert tokens(last) == alone(tiny_llm, IDS[:4])


@pytest.mark.parametrize("read", [0, 1, 3, 7])
def test_an_abandoned_stream_leaves_nothing_running(tiny_llm: LLM, read: int) -> None:
    stream = tiny_llm.stream(IDS[:10], GREEDY)
    for _ in range(read):
        next(stream)
    assert tiny_llm.engine.busy == (read > 0)
    del stream
    gc.collect()
    assert idle(tiny_llm)


def test_an_error_in_the_loop_leaves_nothing_running(tiny_llm: LLM) -> None:
    def read() -> None:
        for output in tiny_llm.stream(IDS[:10], GREEDY):
            if len(output.token_ids) == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
    gc.collect()
    assert idle(tiny_llm)


def test_an_abandoned_stream_takes_nothing_from_another(tiny_llm: LLM) -> None:
    kept, left = tiny_llm.stream(IDS[8], GREEDY), tiny_llm.stream([IDS[8], IDS[9]], GREEDY)
    next(kept), next(left), next(left), next(kept)
    left.close()  # type: ignore[attr-defined]
    *_, last = kept
    assert [last.token_ids] == alone(tiny_llm, [IDS[8]])
    assert idle(tiny_llm)


def test_a_stream_that_fails_leaves_nothing_running(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tiny_llm.stream(IDS[:3], GREEDY)
    next(stream)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        patch.setattr(tiny_llm.engine.ranks, "run", fail)
        list(stream)
    assert idle(tiny_llm)


def fail(*_: object) -> None:
    raise RuntimeError("broken on purpose")


# --- options


def test_unknown_options_are_named(tiny_folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown option max_contxt, pages; there are dtype, quantise, device, max_context,"
    ):
        LLM(tiny_folder, pages=3, max_contxt=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is not one of auto, float32, bfloat16"),
        ({"page_size": 0}, "page_size is 0"),
        ({"chunk": 2.5}, r"chunk is 2\.5"),
        ({"cache_tokens": -1}, "cache_tokens is -1"),
        ({"max_batch_tokens": 3}, "max_batch_tokens 3 is less than max_batch_requests 64"),
        ({"max_context": 513}, "max_context 513 is more than the model's 512 positions"),
    ],
)
def test_options_that_cannot_be_used(tiny_folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LLM(tiny_folder, **options)


def test_options_arrive(new_llm: NewLLM) -> None:
    llm = new_llm(dtype="bfloat16", max_context=60, cache_tokens=90, prefix_cache=False)
    config = llm.engine.config
    assert (config.dtype, config.max_context, config.cache_tokens) == ("bfloat16", 60, 92)
    assert [llm.generate(IDS[9], GREEDY)[0].cached_tokens for _ in range(2)] == [0, 0]


def test_equal_beginnings_are_found(new_llm: NewLLM) -> None:
    llm = new_llm()
    first, second = (llm.generate(IDS[9], GREEDY)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)  # whole pages of 10 tokens
    assert first.token_ids == second.token_ids


# --- folders without this or that


def test_without_a_tokenizer_prompts_are_ids(new_llm: NewLLM, tiny_llm: LLM) -> None:
    llm = new_llm()
    (output,) = llm.generate(IDS[3], GREEDY)
    assert [output.token_ids] == alone(tiny_llm, [IDS[3]]) and output.text == "" == output.delta
    refused: list[Any] = ["the", ["the"], [IDS[3], "the"], USER, [IDS[3], USER]]
    for prompts in refused:
        with pytest.raises(InputError, match=r"has no tokenizer\.json, so prompts must be token ids"):
            llm.generate(prompts, GREEDY)
    with pytest.raises(InputError, match="stop texts need a tokenizer"):
        llm.generate(IDS[3], SamplingParams(stop=("a",)))
    assert idle(llm)


def test_without_a_chat_template_there_is_no_chat(new_llm: NewLLM) -> None:
    llm = new_llm(tokenizer={"chat_template": None})
    assert llm.generate("the", GREEDY)[0].prompt_token_ids == [0, 261]
    with pytest.raises(InputError, match="has no chat template"):
        llm.generate([USER], GREEDY)
    assert idle(llm)


def test_a_folder_may_be_named_by_a_text(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder)
    assert LLM(".").name == tiny_folder.name == LLM(str(tiny_folder)).name


# --- seeds


def seeded(seed: int | None, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 32, "ignore_eos": True, "seed": seed} | changes))


VARIED = [
    seeded(0), seeded(7), seeded(7, top_p=0.9), seeded(7, top_k=20), seeded(-3, temperature=0.7),
    seeded(1 << 80, min_p=0.02), seeded(7, presence_penalty=1.0, frequency_penalty=0.5), seeded(8),
]  # fmt: skip


def test_a_seed_gives_the_same_tokens_alone_and_among_others(tiny_llm: LLM) -> None:
    prompts = IDS[2:10]
    expected = [alone(tiny_llm, [p], one)[0] for p, one in zip(prompts, VARIED, strict=True)]
    assert tokens(tiny_llm.generate(prompts, VARIED)) == expected
    others = [*IDS, *prompts[::-1]], [*[seeded(None)] * 12, *VARIED[::-1]]
    assert tokens(tiny_llm.generate(*others))[12:] == expected[::-1]


def test_a_seed_gives_the_same_tokens_after_preemption(new_llm: NewLLM, tiny_llm: LLM) -> None:
    llm = new_llm(cache_tokens=64, max_batch_requests=5, chunk=3)
    expected = [alone(tiny_llm, [p], one)[0] for p, one in zip(IDS[2:10], VARIED, strict=True)]
    assert tokens(llm.generate(IDS[2:10], VARIED)) == expected
    assert llm.engine.scheduler.preemptions > 3


def test_another_seed_gives_other_tokens(tiny_llm: LLM) -> None:
    seeds = [0, 1, -1, 7, 1 << 63, (1 << 63) + 1, None, None]
    found = tokens(tiny_llm.generate([IDS[3]] * 8, [seeded(seed) for seed in seeds]))
    assert len({tuple(ids) for ids in found}) == 8


# --- the demo model


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM()


def test_the_demo_model_is_the_default(demo: LLM) -> None:
    assert demo.folder == demo_model() and demo.name == "expertmesh-demo"
    assert demo.engine.model.fp8_block == (128, 128) and demo.engine.config.dtype == "bfloat16"
    recommended = json.loads((demo_model() / "generation_config.json").read_text())
    assert demo.default_params().temperature == recommended["temperature"] > 0


def test_the_demo_model_writes_text(demo: LLM) -> None:
    asked = [{"role": "user", "content": "Please tell me a short fairy tale."}]
    prompts: list[Any] = ["Once upon a time there was", asked]
    for output in demo.generate(prompts, SamplingParams(max_tokens=32, temperature=0)):
        assert len(re.findall(r"\b[A-Za-z]+\b", output.text)) > 8
        assert "\N{REPLACEMENT CHARACTER}" not in output.text


def test_the_demo_model_knows_the_order_of_words(demo: LLM) -> None:
    words = ["Once", "upon", "a", "time", "there", "was", "a", "king", "who", "had", "three", "sons"]
    score = SamplingParams(max_tokens=0, prompt_logprobs=0)
    sums = [
        sum(value for report in output.prompt_logprobs or () for value in (report or {}).values())
        for output in demo.generate([" ".join(words), " ".join(words[::-1])], score)
    ]
    assert sums[0] > sums[1] + 10


@pytest.mark.parametrize(
    "prompt", [None, 5, [1.5], [None], ["a", 5], [[1, 2.5]], b"the", [b"the"], [[USER[0], 5]]]
)
def test_what_is_no_prompt_is_refused(tiny_llm: LLM, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"a prompt must be a text, token ids or chat messages"):
        tiny_llm.generate(prompt, GREEDY)
    assert idle(tiny_llm)


def test_a_request_given_to_the_engine_itself_disturbs_no_call(tiny_llm: LLM) -> None:
    expected = alone(tiny_llm, IDS[3:4])
    tiny_llm.engine.submit(IDS[5], GREEDY)
    assert tokens(tiny_llm.generate(IDS[3:4], GREEDY)) == expected
    while tiny_llm.engine.busy:
        tiny_llm.engine.step()
    assert idle(tiny_llm)
