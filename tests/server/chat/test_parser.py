"""Blocks of generated text: the formats as models write them, any cut of the text, and what is no call after all."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.engine.markup import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, ToolMarkup
from expertmesh.server.chat.parser import Begin, End, Event, Parser, Piece

CALLS, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
END_CALL, END_CALLS = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
V3 = f'{CALL}function{SEP}weather\n```json\n{{"city": "Paris"}}\n```{END_CALL}'
V31 = f'{CALL}weather{SEP}{{"city": "Paris"}}{END_CALL}'
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'
)
NO_BRACE = f"{CALLS}{CALL}function{SEP}now\n```json\n```{END_CALL}"
PARIS = ("weather", '{"city": "Paris"}')


def blocks(events: list[Event]) -> list[tuple[str, str, str]]:
    """(kind, name, text) of each block; every one has to begin, be told and end."""
    found: list[tuple[str, str, str]] = []
    is_open = False
    for event in events:
        if isinstance(event, Begin):
            assert not is_open
            is_open = True
            found.append((event.kind, event.name, ""))
        elif isinstance(event, Piece):
            assert is_open and event.text
            kind, name, text = found[-1]
            found[-1] = (kind, name, text + event.text)
        else:
            assert isinstance(event, End) and is_open
            is_open = False
    assert not is_open
    return found


def read(
    text: str, thinking: bool | None = None, tools: ToolMarkup | None = DEEPSEEK_V3
) -> list[tuple[str, str, str]]:
    parser = Parser(thinking, tools)
    return blocks(parser.push(text) + parser.finish())


def content(text: str) -> tuple[str, str, str]:
    return ("content", "", text)


def call(name: str, arguments: str) -> tuple[str, str, str]:
    return ("call", name, arguments)


def reasoning(text: str) -> tuple[str, str, str]:
    return ("reasoning", "", text)


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("hello\n", None, [content("hello\n")]),
        ("hm</think>so", None, [content("hm</think>so")]),
        ("\nhm\n</think>\n\nso", True, [reasoning("hm"), content("so")]),
        ("<think>\nhm\n</think>\n\nso", False, [reasoning("hm"), content("so")]),
        ("\n <think>hm", False, [reasoning("hm")]),
        ("\n\n</think>\n\nso", True, [content("so")]),
        ("so <think>", False, [content("so <think>")]),
        ("<thin", False, [content("<thin")]),
        ("hm\n</thi", True, [reasoning("hm\n</thi")]),
        ("", True, []),
    ],
)
def test_reasoning(text: str, thinking: bool | None, expected: list[object]) -> None:
    assert read(text, thinking) == expected


@pytest.mark.parametrize("markup", [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2])
def test_what_a_markup_writes_is_read(markup: ToolMarkup) -> None:
    calls = [PARIS, ("t-1.x", '{"a": "```", "b": ["\\n"]}'), ("none", "{}")]
    text = "hm</think>\n\nI look.\n" + markup.write_calls(calls)
    assert read(text, True, markup) == [reasoning("hm"), content("I look."), *(call(*c) for c in calls)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{CALLS}{V3}{END_CALLS}", [call(*PARIS)]),
        (f"{CALLS}{V31}{END_CALLS}", [call(*PARIS)]),
        (f"{CALLS}\n{V3}\n{V3}\n{END_CALLS}\n", [call(*PARIS), call(*PARIS)]),
        (f"look\n{CALLS}{V3}{END_CALLS}\nand then", [content("look"), call(*PARIS), content("and then")]),
        # Marks that are missing.
        (V31, [call(*PARIS)]),
        (f"{CALLS}{V31}", [call(*PARIS)]),
        (f"{CALLS}{V31.removesuffix(END_CALL)}{END_CALLS}", [call(*PARIS)]),
        (f"{CALLS}{V31.removesuffix(END_CALL)}{V31}", [call(*PARIS), call(*PARIS)]),
        # Arguments that are missing, cut off, or no JSON.
        (f"{CALLS}{CALL}now{SEP}{END_CALL}{END_CALLS}", [call("now", "{}")]),
        (NO_BRACE, [content(NO_BRACE)]),
        (f'{CALLS}{CALL}weather{SEP}{{"city": "Pa', [call("weather", '{"city": "Pa')]),
        (f'{CALLS}{CALL}function{SEP}weather\n```json\n{{"city": 1}}\n``', [call("weather", '{"city": 1}\n``')]),
        (f"{CALL}weather{SEP}{{oh}}{END_CALL}", [call("weather", "{oh}")]),
        # No calls after all.
        (CALLS, [content(CALLS)]),
        (f"{CALLS}{END_CALLS}", [content(f"{CALLS}{END_CALLS}")]),
        (f"{CALLS} no", [content(f"{CALLS} no")]),
        (f"{CALLS}\n{CALL}weather", [content(f"{CALLS}\n{CALL}weather")]),
        (f"{CALLS}{CALL} a b {{}}{END_CALL}", [content(f"{CALLS}{CALL} a b {{}}{END_CALL}")]),
        (f"a {END_CALL} b {SEP}", [content(f"a {END_CALL} b {SEP}")]),
        (f"{CALL}{{{CALLS}{V3}", [content(f"{CALL}{{"), call(*PARIS)]),
    ],
)  # fmt: skip
def test_calls_of_deepseek(text: str, expected: list[object]) -> None:
    assert read(text) == expected


def test_a_call_ends_reasoning() -> None:
    assert read(f"hm\n{CALLS}{V3}{END_CALLS}", True) == [reasoning("hm"), call(*PARIS)]


def test_kimi_writes_an_id() -> None:
    parser = Parser(None, KIMI_K2)
    events = parser.push(KIMI) + parser.finish()
    assert events[0] == Begin("call", "weather", "functions.weather:0")
    assert blocks(events) == [call(*PARIS)]


def test_without_tools_marks_are_content() -> None:
    assert read(f"{CALLS}{V3}{END_CALLS}", None, None) == [content(f"{CALLS}{V3}{END_CALLS}")]


def test_everything_is_told_as_soon_as_it_is_certain() -> None:
    parser = Parser(True, DEEPSEEK_V31)
    assert parser.push("a") == [Begin("reasoning"), Piece("a")]
    assert parser.push("\n</thi") == []
    assert parser.push("nk>\n") == [End()]
    assert parser.push("b <") == [Begin("content"), Piece("b ")]
    assert parser.push("c") == [Piece("<c")]
    assert parser.push(CALLS + CALL + "f" + SEP) == []
    assert parser.push('{"x":') == [End(), Begin("call", "f"), Piece('{"x":')]
    assert parser.push(' "') == [Piece(' "')]
    assert parser.push("`") == []
    assert parser.push('y"}') == [Piece('`y"}')]
    assert parser.push(END_CALL) == [End()]
    assert parser.finish() == []


marks = [
    CALLS,
    CALL,
    SEP,
    END_CALL,
    END_CALLS,
    "<think>",
    "</think>",
    "function",
    "f",
    "{",
    "}",
    '"',
    "\n",
    "```",
    "json",
    " ",
    "`",
]
texts = st.lists(st.sampled_from([*marks, V3, V31]) | st.text("<｜a{}\n `", max_size=4), max_size=12).map(
    "".join
)


@given(texts, st.sampled_from([None, True, False]), st.booleans(), st.data())
def test_how_the_text_is_cut_does_not_matter(
    text: str, thinking: bool | None, tools: bool, data: st.DataObject
) -> None:
    markup = DEEPSEEK_V3 if tools else None
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parser = Parser(thinking, markup)
    events: list[Event] = []
    for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += parser.push(text[a:b])
    assert blocks(events + parser.finish()) == read(text, thinking, markup)


@given(texts, st.sampled_from([None, True, False]))
def test_nothing_is_lost_but_marks_and_the_space_around_them(text: str, thinking: bool | None) -> None:
    found = "".join(name + told for _, name, told in read(text, thinking))
    left = iter(text + "{}" * text.count(CALL))  # of a call without arguments
    removed = "".join(_skip(left, character) for character in found)
    assert found == removed
    if CALL not in text and CALLS not in text:
        kept = text.replace("\n", "").replace("<think>", "").replace("</think>", "").strip()
        told = found.replace("\n", "").replace("<think>", "").replace("</think>", "").strip()
        assert kept == told


def _skip(left: "object", character: str) -> str:
    """The character, where it is still to come in what is left."""
    return next((c for c in left if c == character), "")  # type: ignore[attr-defined]


@given(st.dictionaries(st.text(max_size=5), st.text("a`\n<｜ é🙂", max_size=8), max_size=3), st.booleans())
def test_arguments_arrive_as_they_were_written(arguments: dict[str, str], indent: bool) -> None:
    written = json.dumps(arguments, ensure_ascii=False, indent=1 if indent else None)
    for markup in (DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2):
        assert read(markup.write_calls([("f", written)]), None, markup) == [call("f", written)]
