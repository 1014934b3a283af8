"""Grammars of outputs, by the library xgrammar: from a request's JSON text to what follows its tokens.

The library is imported where the first grammar comes; whoever has none does not need it.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expertmesh.engine.schema import spelled_out
from expertmesh.errors import InputError
from expertmesh.request import read_grammar

if TYPE_CHECKING:
    import xgrammar

# Spaces and line ends between two parts of JSON: models that are unsure would write them for ever.
MOST_SPACES = 16


@dataclass(frozen=True)
class Source:
    """A grammar in a form that the library takes. after: the bytes of the text that comes before it, if any."""

    form: Literal["schema", "regex", "ebnf", "tag"]
    text: str
    after: bytes = b""


def source_of(grammar: str) -> Source:
    """The grammar of `SamplingParams`. InputError where it asks for what is not possible."""
    spec = read_grammar(grammar)
    after = spec.get("after", "").encode()
    match spec["type"]:
        case "json_object":
            return Source("schema", json.dumps({"type": "object", "additionalProperties": True}), after)
        case "json_schema":
            return Source("schema", json.dumps(spelled_out(spec["schema"])), after)
        case "regex":
            return Source("regex", _agreed_on(spec["pattern"]), after)
        case "ebnf":
            return Source("ebnf", spec["grammar"], after)
        case "choice":
            texts = [{"type": "const_string", "value": text} for text in dict.fromkeys(spec["choices"])]
            tag: dict[str, Any] = {"type": "or", "elements": texts}
        case _:
            tag = _with_schemas(spec["format"])
    return Source("tag", json.dumps({"type": "structural_tag", "format": tag}), after)


def check(source: Source) -> None:
    """InputError where it cannot be read. Takes a millisecond or so, of the longest ones up to a second;
    compiling takes much longer."""
    parse = library().Grammar
    try:
        match source.form:
            case "schema":
                parse.from_json_schema(source.text, max_whitespace_cnt=MOST_SPACES)
            case "regex":
                parse.from_regex(source.text)
            case "ebnf":
                parse.from_ebnf(source.text)
            case "tag":
                parse.from_structural_tag(source.text)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"grammar cannot be used: {_cause(error)}") from None


def compile_source(compiler: "xgrammar.GrammarCompiler", source: Source) -> "xgrammar.CompiledGrammar":
    """For the compiler's vocabulary. InputError where it names a token that is not in there."""
    try:
        match source.form:
            case "schema":
                return compiler.compile_json_schema(source.text, max_whitespace_cnt=MOST_SPACES)
            case "regex":
                return compiler.compile_regex(source.text)
            case "ebnf":
                return compiler.compile_grammar(source.text)
            case "tag":
                return compiler.compile_structural_tag(source.text)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"grammar cannot be used: {_cause(error)}") from None


def library() -> Any:
    """xgrammar. InputError where it is not installed."""
    try:
        import xgrammar
    except ImportError as error:
        raise InputError(
            f"grammar needs the package xgrammar: pip install 'expertmesh[grammar]' ({error})"
        ) from None
    return xgrammar


def _cause(error: Exception) -> str:
    """What the library says, without the place in its source."""
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip()


# What these stand for differs between kinds of regular expressions: what all of them agree on.
CLASSES = {".": r"[^\n]", r"\s": r"[ \t\n\r\f\v]", r"\S": r"[^\s\x1c-\x1f\x85]"}
CLASSES_WITHIN = {r"\s": r" \t\n\r\f\v"}


def _agreed_on(pattern: str) -> str:
    """A dot stands for no line end, and spaces are those of ASCII; the library is more generous."""
    out, within = [], False
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        out.append((CLASSES_WITHIN if within else CLASSES).get(piece, piece))
        within = piece == "[" or (within and piece != "]")
    return "".join(out)


def _with_schemas(part: Any) -> Any:
    """A structural tag with the schemas in it spelled out."""
    if isinstance(part, list):
        return [_with_schemas(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "json_schema" and "json_schema" in part:
        return part | {"json_schema": spelled_out(part["json_schema"])}
    return {key: _with_schemas(value) for key, value in part.items()}
