"""What an answer must look like, as a grammar for the engine: calls that are required, formats of the content."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expertmesh.engine.markup import END_THINK, ToolMarkup
from expertmesh.server.chat.turn import Tool, Turn

# How a constraint on the whole answer is written as a part of a larger one.
_PARTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "json_schema": lambda c: {"type": "json_schema", "json_schema": c["schema"]},
    "json_object": lambda c: {"type": "json_schema", "json_schema": {"type": "object"}},
    "regex": lambda c: {"type": "regex", "pattern": c["pattern"]},
    "ebnf": lambda c: {"type": "grammar", "grammar": c["grammar"]},
    "choice": lambda c: _either([_text(choice) for choice in c["choices"]]),
    "structural_tag": lambda c: c["format"],
}


def grammar_of(turn: Turn, markup: ToolMarkup, reasons: bool) -> str | None:
    """SamplingParams.grammar for a turn. reasons: the answer begins with reasoning, which nothing is asked of."""
    constraint = _constraint(turn, markup)
    if constraint is None:
        return None
    return json.dumps({**constraint, "after": END_THINK} if reasons else constraint, ensure_ascii=False)


def _constraint(turn: Turn, markup: ToolMarkup) -> Mapping[str, Any] | None:
    tools = turn.callable
    if tools and turn.choice == "required":
        return _tag(_section(tools, markup, turn.parallel))
    if turn.constraint is not None and tools:
        return _tag(
            _either(
                [_PARTS[turn.constraint["type"]](turn.constraint), _section(tools, markup, turn.parallel)]
            )
        )
    if turn.constraint is None and any(tool.strict for tool in tools):
        return _tag(_free_until_a_call(tools, markup))
    return turn.constraint


def _tag(form: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}


def _section(tools: Sequence[Tool], markup: ToolMarkup, parallel: bool) -> dict[str, Any]:
    """One call, or several, with nothing around them."""
    calls = {
        "type": "tags_with_separator",
        "tags": [_call(tool, markup, tool.parameters) for tool in tools],
        "separator": markup.between,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    begin, end = (_text(mark) for mark in markup.section)
    return {"type": "sequence", "elements": [begin, calls, end]}


def _free_until_a_call(tools: Sequence[Tool], markup: ToolMarkup) -> dict[str, Any]:
    """Any text; as soon as a call begins, it keeps to the schema of its tool where that is strict."""
    anything = {"type": "object"}
    return {
        "type": "triggered_tags",
        "triggers": [markup.call[0]],
        "tags": [_call(tool, markup, tool.parameters if tool.strict else anything) for tool in tools],
    }


def _call(tool: Tool, markup: ToolMarkup, schema: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {"type": "json_schema", "json_schema": schema}
    before, number, after = markup.head.partition("{number}")
    digits = {"type": "regex", "pattern": "[0-9]{1,3}"}
    content = {"type": "sequence", "elements": [digits, _text(after), arguments]} if number else arguments
    begin = markup.call[0] + before.format(name=tool.name)
    return {"type": "tag", "begin": begin, "content": content, "end": markup.tail + markup.call[1]}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _either(elements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "or", "elements": elements}
