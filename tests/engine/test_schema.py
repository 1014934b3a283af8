"""JSON schemas: whatever a schema lets through is valid by jsonschema, and what cannot be kept is refused."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh import InputError
from expertmesh.engine.schema import ALONE, KEYWORDS, LISTS, MAPS, ONE, REFUSED, spelled_out
from tests.support.walks import walk

LEAVES: list[Any] = [
    {"type": "string"}, {"type": "string", "maxLength": 3}, {"type": "string", "minLength": 1, "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{2}$"}, {"type": "string", "pattern": "a.*b"}, {"pattern": "[^a]+"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "date", "maxLength": 3}, {"format": "nope"},
    {"type": "integer"}, {"type": "integer", "minimum": -3, "maximum": 120}, {"type": "integer", "multipleOf": 7},
    {"type": "number"}, {"type": "number", "minimum": 0.5, "maximum": 2.25}, {"exclusiveMinimum": 0},
    {"type": "number", "exclusiveMaximum": -1.5}, {"type": "boolean"}, {"type": "null"}, {}, True,
    {"enum": ["x", 1, None, [1, "é"], {"k": 2}]}, {"enum": [1, "x", 2.5], "type": "integer"}, {"const": 'q"\n'},
    {"type": ["string", "null"], "maxLength": 2}, {"minLength": 2, "minimum": 5},
]  # fmt: skip
NAMES = st.sampled_from(["a", "b", "ab", 'é"', "x/y"])
COUNTS = {"minItems": st.integers(0, 1), "maxItems": st.integers(2, 3)}


def objects(inner: st.SearchStrategy[Any], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    optional = {
        "required": st.lists(NAMES, unique=True, max_size=2),
        "additionalProperties": st.booleans() | inner,
        "minProperties": st.integers(0, 1),
        "maxProperties": st.integers(2, 4),
    }
    return st.fixed_dictionaries({"type": st.just("object")} | fixed, optional=optional)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    patterns = st.dictionaries(st.sampled_from(["^a", "b$", "[xy]"]), inner, min_size=1, max_size=2)
    prefix = st.lists(inner, min_size=1, max_size=2)
    array = {"type": st.just("array")}
    return st.one_of(
        st.fixed_dictionaries(array | {"items": inner}, optional=COUNTS),
        st.fixed_dictionaries(array | {"prefixItems": prefix}, optional=COUNTS | {"items": st.just(False)}),
        objects(inner, properties=st.dictionaries(NAMES, inner, max_size=3)),
        objects(inner),
        st.fixed_dictionaries({"type": st.just("object"), "patternProperties": patterns}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}, optional={"title": st.just("t")}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=1)}),
    )  # fmt: skip


schemas = st.recursive(st.sampled_from(LEAVES), nested, max_leaves=5)


def grammar(schema: Any) -> str:
    return json.dumps({"type": "json_schema", "schema": schema})


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(schemas, st.integers(0, 999))
def test_what_is_written_is_valid(schema: Any, seed: int) -> None:
    try:
        text = walk(grammar(schema), seed)
    except InputError as error:
        assert str(error).startswith("grammar")
        return
    if text is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


RECURSIVE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "left": {"$ref": "#/$defs/tree"}},
            "required": ["name"],
        }
    },
    "$ref": "#/$defs/tree",
}


@pytest.mark.parametrize("schema", [*LEAVES, RECURSIVE, {"type": "object"}, {"type": "array"}], ids=str)
def test_every_kind_is_written(schema: Any) -> None:
    texts = [text for seed in range(20) if (text := walk(grammar(schema), seed)) is not None]
    assert texts
    for text in texts:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_an_object_without_properties_may_have_any() -> None:
    found = [
        json.loads(t) for seed in range(60) if (t := walk(grammar({"type": "object"}), seed)) is not None
    ]
    assert any(found) and all(isinstance(value, dict) for value in found)


def test_declared_properties_are_all_there_are() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    found = {
        json.dumps(json.loads(t)) for seed in range(40) if (t := walk(grammar(schema), seed)) is not None
    }
    assert found == {"{}", '{"a": null}'}


def test_a_name_that_is_required_is_declared() -> None:
    schema = {"type": "object", "required": ["q"], "additionalProperties": {"const": 5}}
    for seed in range(10):
        text = walk(grammar(schema), seed)
        assert text is None or json.loads(text)["q"] == 5


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "properties": {"a/b": {"if": {}, "then": {}}}}, "#/properties/a~1b"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": [{}]}, "prefixItems"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "allOf"),
        ({"anyOf": [{"type": "string"}], "minLength": 3}, "minLength beside anyOf"),
        ({"anyOf": [{"type": "string"}], "type": "string"}, "type beside anyOf"),
        ({"$ref": "#/$defs/x", "maxLength": 1, "$defs": {"x": {"type": "string"}}}, "maxLength beside"),
        ({"$ref": "https://example.org/x"}, "example.org"),
        ({"$ref": "#/$defs/y", "$defs": {"x": {}}}, "y"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "pattern"),
        ({"type": "string", "pattern": "(?=a)b"}, "looks around"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
        ({"type": "integer", "multipleOf": 3, "minimum": 4}, "multipleOf"),
        ({"enum": ["x"], "type": "integer"}, "enum"),
        ({"enum": []}, "enum"),
        ({"const": 1, "type": "string"}, "const"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is required"),
        ({"type": "object", "required": "a"}, "required"),
        ({"type": "object", "properties": [1]}, "properties"),
        ({"type": "object", "properties": {"a": 5}}, "#/properties/a"),
        ({"anyOf": {}}, "anyOf"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}, "required": ["b"]}, "propertyNames"),
        ({"type": "foo"}, "foo"),
        ({"type": 5}, ""),
        (False, "false"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused(schema: Any, named: str) -> None:
    with pytest.raises(InputError, match=r"^grammar") as caught:
        walk(grammar(schema), 0)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_schema_is_not_nested_for_ever() -> None:
    schema: Any = {"type": "string"}
    for _ in range(70):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(InputError, match="nested"):
        spelled_out(schema)


def test_the_schema_that_is_given_stays_as_it_is() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"b": {"minLength": 3}}}
    before = json.dumps(schema)
    spelled_out(schema)
    assert json.dumps(schema) == before


KEYS = st.sampled_from(
    sorted({"type", "$defs", *ALONE, *REFUSED, *ONE, *LISTS, *MAPS, *set().union(*KEYWORDS.values())})
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from(["string", "object", "#", "a", 0.5, "integer"])
)
anything = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(anything)
def test_whatever_is_given_is_taken_or_refused(schema: Any) -> None:
    try:
        walk(grammar(schema), 0, most=20)
    except InputError as error:
        assert str(error).startswith("grammar")
