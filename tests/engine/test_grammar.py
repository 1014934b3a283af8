"""Grammars of all types: Python's regular expressions judge, and broken ones are one clear error."""

import json
import re
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh import InputError
from expertmesh.engine.grammar import check, source_of
from tests.support.walks import walk


def regex(pattern: str) -> str:
    return json.dumps({"type": "regex", "pattern": pattern})


def text_of(**grammar: Any) -> str | None:
    return walk(json.dumps(grammar), 3)


CHARACTERS = [
    "a",
    "é",
    "😀",
    "[a-f]",
    "[^a-f]",
    r"\d",
    r"\w",
    ".",
    r"\.",
    "[.]",
    r"\n",
    r"\s",
    r"\S",
    r"[\sx]",
    r"\[.",
]
PATTERNS = st.recursive(
    st.sampled_from(CHARACTERS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(lambda p: f"({p[0]}){p[1]}"),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(PATTERNS, st.integers(0, 99))
def test_all_of_the_text_matches_the_regular_expression(pattern: str, seed: int) -> None:
    text = walk(regex(pattern), seed)
    assert text is None or re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "pattern", ["^ab?$", r"[0-9]{3}-[a-z]{2,4}", r".{5}", r"(GET|POST) /\S+", "", "[^\ud7ff]"]
)
def test_regular_expressions(pattern: str) -> None:
    texts = [t for seed in range(30) if (t := walk(regex(pattern), seed)) is not None]
    assert texts and all(re.fullmatch(pattern, text) for text in texts)


def test_choices_are_taken_whole_and_all_of_them() -> None:
    choices = ["yes", "yesterday", "no", 'é😀\n"\\x', " ", "no"]
    grammar = json.dumps({"type": "choice", "choices": choices})
    assert {walk(grammar, seed) for seed in range(80)} == set(choices)


def test_json_objects_are_objects() -> None:
    grammar = json.dumps({"type": "json_object"})
    found = [json.loads(t) for seed in range(30) if (t := walk(grammar, seed)) is not None]
    assert any(found) and all(isinstance(value, dict) for value in found)


def test_ebnf() -> None:
    assert re.fullmatch(
        "a{3}[bc]*", text_of(type="ebnf", grammar='root ::= "a"{3} tail\ntail ::= [bc]*') or ""
    )


def test_structural_tags_hold_schemas_to_the_same() -> None:
    content = {"type": "json_schema", "json_schema": {"type": "object", "required": ["n"]}}
    tag = {"type": "tag", "begin": "<call>", "content": content, "end": "</call>"}
    text = text_of(type="structural_tag", format=tag) or ""
    assert "n" in json.loads(text.removeprefix("<call>").removesuffix("</call>"))
    content["json_schema"] = {"not": {}}
    with pytest.raises(InputError, match=r"^grammar: the schema at #: not"):
        text_of(type="structural_tag", format=tag)


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "regex", "pattern": "("},
        {"type": "regex", "pattern": "(?=a)b"},
        {"type": "regex", "pattern": r"(a)\1"},
        {"type": "regex", "pattern": "(" * 5000},
        {"type": "ebnf", "grammar": ""},
        {"type": "ebnf", "grammar": "root ::= other"},
        {"type": "ebnf", "grammar": "root ::= " + "(" * 5000},
        {"type": "structural_tag", "format": {"type": "nothing"}},
        {"type": "structural_tag", "format": {}},
    ],
    ids=lambda g: str(g)[:50],
)
def test_broken_grammars_are_one_clear_error(grammar: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^grammar cannot be used: ") as caught:
        check(source_of(json.dumps(grammar)))
    assert "\n" not in str(caught.value) and ".cc:" not in str(caught.value)


def test_without_the_library_it_is_said_what_to_install() -> None:
    with (
        mock.patch.dict("sys.modules", {"xgrammar": None}),
        pytest.raises(InputError, match=r"^grammar needs .* pip install 'expertmesh\[grammar\]'"),
    ):
        check(source_of('{"type": "json_object"}'))
