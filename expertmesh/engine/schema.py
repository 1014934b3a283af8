"""JSON schemas as the grammar library takes them: what it would pass over in silence is refused, or spelled out.

An output that a schema allows has to be valid by that schema, so a keyword that cannot be kept is an error. Keywords
that nobody knows are annotations, as the specification has it, and so is a format that goes with other limits of a
string. No torch.
"""

import re
from collections.abc import Mapping
from typing import Any

from expertmesh.errors import InputError

MOST_NESTED = 64  # the time to compile grows with more than the square of the depth

REFUSED = {
    "not", "if", "contains", "dependentRequired", "dependentSchemas", "dependencies", "additionalItems",
    "$dynamicRef", "$recursiveRef",
}  # fmt: skip
# Where one of these is, others beside it would not count.
ALONE = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "object": {
        "properties", "patternProperties", "additionalProperties", "propertyNames", "required", "minProperties",
        "maxProperties", "unevaluatedProperties",
    },
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"},
}  # fmt: skip
# Where schemas are inside of schemas: one, several in a list, several by name.
ONE = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions")


def spelled_out(schema: object, path: str = "#") -> Any:
    """The schema with all that it means said in words that count. InputError where it has what cannot be kept.

    A schema without a type gets the types that its keywords are about. Objects that declare properties have no others
    unless they say so; names that are required are declared.
    """
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise InputError(f"grammar: the schema at {path} must be an object, true or false")
    if path.count("/") > 2 * MOST_NESTED:
        raise InputError(f"grammar: the schema is nested more than {MOST_NESTED} deep; use $ref and $defs")
    for name in sorted(REFUSED & schema.keys()):
        _refuse(path, f"{name} is not possible")
    _check_shape(schema, path)
    out = dict(schema)
    for name in ONE:
        if name in out:
            out[name] = spelled_out(out[name], f"{path}/{name}")
    for name in LISTS:
        if name in out:
            out[name] = [spelled_out(s, f"{path}/{name}/{i}") for i, s in enumerate(out[name])]
    for name in MAPS:
        if name in out:
            out[name] = {k: spelled_out(s, f"{path}/{name}/{_part(k)}") for k, s in out[name].items()}
    if any(name in out for name in ALONE):
        return _alone(out, path)
    families = [kind for kind, names in KEYWORDS.items() if names & out.keys()]
    if "type" not in out and families:
        out["type"] = families[0] if len(families) == 1 else families
    types = out.get("type")
    for kind in types if isinstance(types, list) else [types]:
        if isinstance(kind, str) and kind in _BY_TYPE:
            _BY_TYPE[kind](out, path)
    return out


def _refuse(path: str, what: str) -> None:
    raise InputError(f"grammar: the schema at {path}: {what}")


def _part(key: str) -> str:
    """A name as a part of a path."""
    return key.replace("~", "~0").replace("/", "~1")


def _check_shape(schema: Mapping[str, Any], path: str) -> None:
    if isinstance(schema.get("items"), list):
        _refuse(path, "items is a list; use prefixItems")
    for name in LISTS:
        if name in schema and not (isinstance(schema[name], list) and schema[name]):
            _refuse(path, f"{name} must be a list of schemas, at least one")
    for name in MAPS:
        if name in schema and not isinstance(schema[name], Mapping):
            _refuse(path, f"{name} must be an object")
    required = schema.get("required", [])
    if not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        _refuse(path, "required must be a list of names")


def _alone(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """A schema that takes one of ALONE; the type beside values is kept by leaving out those of other types."""
    there = [name for name in ALONE if name in schema]
    beside = sorted({name for names in KEYWORDS.values() for name in names} & schema.keys())
    first = there[0]
    if first in ("enum", "const"):
        values = schema["enum"] if first == "enum" else [schema["const"]]
        if not isinstance(values, list):
            _refuse(path, "enum must be a list of values")
        types = schema.pop("type", None)
        kept = [
            v for v in values if types is None or _is_of(v, types if isinstance(types, list) else [types])
        ]
        if not kept:
            _refuse(path, f"{first} has no value of its type")
        schema[first] = kept if first == "enum" else kept[0]
    elif "type" in schema:
        beside.insert(0, "type")
    beside = there[1:] + beside
    if beside:
        _refuse(path, f"{', '.join(beside)} beside {first} is not possible; write it into one schema")
    if len(schema.get("allOf", ())) > 1:
        _refuse(path, "allOf of several schemas is not possible; write them into one")
    ref = schema.get("$ref", "#")
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        _refuse(path, f"$ref {ref!r} is not a path in this schema, such as #/$defs/name")
    return schema


def _is_of(value: object, types: list[Any]) -> bool:
    """Whether a value is of one of these JSON types."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and float(value).is_integer())
    names = {str: "string", dict: "object", list: "array", type(None): "null"}
    return names[type(value)] in types


def _string(schema: dict[str, Any], path: str) -> None:
    others = {"minLength", "maxLength", "pattern"} & schema.keys()
    if others:
        schema.pop("format", None)
    if "pattern" in others and len(others) > 1:
        _refuse(
            path, "pattern beside minLength or maxLength is not possible; write the length into the pattern"
        )
    if re.search(r"\(\?[=!<]|\\[bB]", str(schema.get("pattern", ""))):
        _refuse(path, "pattern looks around, which is not possible")
    if others and "pattern" not in others:
        # The library would let control characters into the string, which JSON does not.
        least, most = schema.pop("minLength", 0), schema.pop("maxLength", None)
        if (
            not isinstance(least, int)
            or not isinstance(most, int | None)
            or least > (least if most is None else most)
        ):
            _refuse(path, "minLength and maxLength must be whole numbers, the first not above the second")
        schema["pattern"] = rf'^[^"\\\x00-\x1f]{{{least},{"" if most is None else most}}}$'


def _number(schema: dict[str, Any], path: str) -> None:
    if "multipleOf" in schema:
        _refuse(path, "multipleOf is possible for integers only")


def _integer(schema: dict[str, Any], path: str) -> None:
    if "multipleOf" in schema and (KEYWORDS["number"] & schema.keys()) != {"multipleOf"}:
        _refuse(path, "multipleOf beside a range is not possible")


def _object(schema: dict[str, Any], path: str) -> None:
    declared, required = schema.get("properties", {}), schema.get("required", [])
    by_name = {"patternProperties", "propertyNames"} & schema.keys()
    # Names that a pattern allows may be repeated, which no count of properties would notice.
    others = {"properties", "additionalProperties", "minProperties"} & schema.keys()
    if "propertyNames" in by_name and (others or required or len(by_name) > 1):
        _refuse(path, "propertyNames beside other keywords about properties is not possible")
    if by_name and "minProperties" in schema:
        _refuse(path, "minProperties beside patternProperties is not possible")
    if not declared and not by_name and "additionalProperties" not in schema:
        schema["additionalProperties"] = True
    missing = [name for name in required if name not in declared]
    if missing:
        rest = schema.get("additionalProperties", True)
        if rest is False or by_name:
            _refuse(path, f"{missing[0]!r} is required, but not among the properties")
        schema["properties"] = {**declared, **dict.fromkeys(missing, rest)}


def _array(schema: dict[str, Any], path: str) -> None:
    if schema.get("uniqueItems"):
        _refuse(path, "uniqueItems is not possible")
    if "items" not in schema and "prefixItems" not in schema:
        schema["items"] = True


_BY_TYPE = {"string": _string, "number": _number, "integer": _integer, "object": _object, "array": _array}
