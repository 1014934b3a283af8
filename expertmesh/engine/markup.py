"""Texts with a meaning in what a model writes: where its reasoning and its calls of tools begin and end. Data only; the
formats are those of the checkpoints' own chat templates and model cards."""

import re
from dataclasses import dataclass

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ToolMarkup:
    """How a family of models writes calls of tools, and how their results are shown to it.

    A message's calls are a section; each is a head, arguments (a JSON object) and a tail between the marks of a call.
    section, call, results and result are pairs of marks. head: with {name} and {number}, counted from 0. heads: every
    way in which models are known to write one, up to the first brace; groups name or bare, and id where the model
    writes one. between: what the template puts between calls.
    """

    section: tuple[str, str]
    call: tuple[str, str]
    head: str
    heads: re.Pattern[str]
    tail: str
    between: str
    results: tuple[str, str]
    result: tuple[str, str]

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.section, *self.call)

    def write_call(self, name: str, arguments: str, number: int) -> str:
        head = self.head.format(name=name, number=number)
        return f"{self.call[0]}{head}{arguments}{self.tail}{self.call[1]}"

    def write_calls(self, calls: list[tuple[str, str]]) -> str:
        """A section with these calls, each a name and its arguments as JSON."""
        written = [self.write_call(*call, number) for number, call in enumerate(calls)]
        return self.section[0] + self.between.join(written) + self.section[1]

    def write_results(self, texts: list[str]) -> str:
        written = [f"{self.result[0]}{text}{self.result[1]}" for text in texts]
        return self.results[0] + self.between.join(written) + self.results[1]


_DEEPSEEK_HEADS = re.compile(
    r"\s*function<｜tool▁sep｜>\s*(?P<name>[^\s`<]+)\s*(?:```(?:json)?\s*)?"
    r"|\s*(?P<bare>[^\s`<]+)\s*<｜tool▁sep｜>\s*(?:```(?:json)?\s*)?"
)

DEEPSEEK_V3 = ToolMarkup(
    section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    head="function<｜tool▁sep｜>{name}\n```json\n",
    heads=_DEEPSEEK_HEADS,
    tail="\n```",
    between="\n",
    results=("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    result=("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)

DEEPSEEK_V31 = ToolMarkup(
    section=DEEPSEEK_V3.section,
    call=DEEPSEEK_V3.call,
    head="{name}<｜tool▁sep｜>",
    heads=_DEEPSEEK_HEADS,
    tail="",
    between="",
    results=("", ""),
    result=DEEPSEEK_V3.result,
)

KIMI_K2 = ToolMarkup(
    section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    call=("<|tool_call_begin|>", "<|tool_call_end|>"),
    head="functions.{name}:{number}<|tool_call_argument_begin|>",
    heads=re.compile(r"\s*(?P<id>functions\.(?P<name>[^\s<]+):\d+)\s*<\|tool_call_argument_begin\|>\s*"),
    tail="",
    between="",
    results=("", ""),
    result=("", ""),
)

# Kept in texts although tokenizers call them special: without them nobody could tell a call from an answer.
MARKS = frozenset(
    {THINK, END_THINK, "<｜tool▁sep｜>", "<|tool_call_argument_begin|>"}
    | {mark for markup in (DEEPSEEK_V3, KIMI_K2) for mark in markup.marks}
)
