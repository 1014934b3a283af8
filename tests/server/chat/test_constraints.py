"""Constraints on calls, judged by the engine's grammar library itself: what must be accepted and what must not."""

import json
from typing import Any

import pytest

from expertmesh.engine.markup import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, ToolMarkup
from expertmesh.server.chat.constraints import grammar_of
from expertmesh.server.chat.turn import Tool, Turn

xgrammar = pytest.importorskip("xgrammar")

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", CITY | {"additionalProperties": False}, strict=True)
NOW = Tool("now", {"type": "object", "properties": {}, "additionalProperties": False})
PARIS, TIME = ("weather", '{"city": "Paris"}'), ("now", "{}")


def accepts(turn: Turn, markup: ToolMarkup, text: str) -> bool:
    """Whether the grammar lets the whole answer be this text."""
    grammar = json.loads(grammar_of(turn, markup, reasons=False) or "")
    assert grammar["type"] == "structural_tag"
    vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(
        xgrammar.GrammarCompiler(info).compile_structural_tag(json.dumps(grammar))
    )
    return bool(matcher.accept_string(text) and matcher.accept_token(256))


@pytest.mark.parametrize("markup", [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2])
class TestCalls:
    def test_required(self, markup: ToolMarkup) -> None:
        turn = Turn([], [WEATHER, NOW], choice="required")
        assert accepts(turn, markup, markup.write_calls([PARIS]))
        assert accepts(turn, markup, markup.write_calls([PARIS, TIME, PARIS]))
        for text in (
            "",
            "Yes.",
            "{}",
            markup.write_calls([("weather", "{}")]),
            markup.write_calls([("x", "{}")]),
        ):
            assert not accepts(turn, markup, text)

    def test_one_at_a_time(self, markup: ToolMarkup) -> None:
        turn = Turn([], [WEATHER, NOW], choice="required", parallel=False)
        assert accepts(turn, markup, markup.write_calls([PARIS]))
        assert not accepts(turn, markup, markup.write_calls([PARIS, TIME]))

    def test_a_named_one(self, markup: ToolMarkup) -> None:
        turn = Turn([], [WEATHER, NOW], only=["now"], choice="required")
        assert accepts(turn, markup, markup.write_calls([TIME]))
        assert not accepts(turn, markup, markup.write_calls([PARIS]))

    def test_strict_ones_when_the_model_likes(self, markup: ToolMarkup) -> None:
        turn = Turn([], [WEATHER, NOW])
        for text in ("Yes.", "I look. " + markup.write_calls([PARIS, TIME]) + " So."):
            assert accepts(turn, markup, text)
        assert not accepts(turn, markup, markup.write_calls([("weather", '{"town": "Paris"}')]))
        assert grammar_of(Turn([], [NOW]), markup, reasons=False) is None

    @pytest.mark.parametrize(
        ("constraint", "text"),
        [
            ({"type": "json_schema", "schema": CITY}, PARIS[1]),
            ({"type": "json_object"}, '{"a": [1]}'),
            ({"type": "regex", "pattern": "a+"}, "aaa"),
            ({"type": "ebnf", "grammar": 'root ::= "ab" | "c"'}, "ab"),
            ({"type": "choice", "choices": ["yes", "no"]}, "no"),
            ({"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}, "x"),
        ],
    )
    def test_a_format_or_calls(self, markup: ToolMarkup, constraint: dict[str, Any], text: str) -> None:
        turn = Turn([], [NOW], constraint=constraint)
        assert accepts(turn, markup, text) and accepts(turn, markup, markup.write_calls([TIME]))
        assert not accepts(turn, markup, "Well, " + text)


def test_nothing_is_asked_of_reasoning() -> None:
    turn = Turn([], [NOW], choice="required")
    assert json.loads(grammar_of(turn, DEEPSEEK_V3, reasons=True) or "")["after"] == "</think>"
