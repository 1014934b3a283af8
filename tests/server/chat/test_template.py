"""Prompts with tools, by templates in the published forms and by one that knows no tools."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from expertmesh import InputError
from expertmesh.engine.markup import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.llm import demo_model
from expertmesh.server.chat.parser import Parser
from expertmesh.server.chat.template import ChatTemplate, begins_reasoning
from expertmesh.server.chat.turn import Tool, Turn
from tests.server.chat.test_parser import blocks
from tests.server.scripted import template

WEATHER = Tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}}, "Looks outside.")
ASK: dict[str, Any] = {"role": "user", "content": "Is it raining?"}
CALL = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
CALLING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "functions.weather:0", "content": "wet"}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """The demo's tokenizer with a chat template of this name; None: the demo's own."""

    def make(name: str | None) -> ChatTemplate:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model() / file, tmp_path)
        if name is not None:
            shutil.copy(template(name), tmp_path / "chat_template.jinja")
        return ChatTemplate(Tokenizer(tmp_path, 8192))

    return make


@pytest.mark.parametrize(
    ("name", "markup"),
    [
        ("deepseek_v3", DEEPSEEK_V3),
        ("deepseek_v31", DEEPSEEK_V31),
        ("kimi_k2", KIMI_K2),
        (None, DEEPSEEK_V31),
    ],
)
def test_calls_that_a_template_shows_are_read_again(load: Any, name: str | None, markup: Any) -> None:
    """The parser reads what the checkpoint's own template writes, and the markup is the template's."""
    chat = load(name)
    assert chat.markup is markup
    said = CALLING | {"tool_calls": [CALL, CALL | {"id": "functions.weather:1"}]}
    prompt = chat.render(Turn([ASK, said, RESULT, {"role": "assistant", "content": "Yes."}, ASK]))
    begin, end = chat.markup.section
    shown = prompt[prompt.index(begin) : prompt.index(end) + len(end)]
    parser = Parser(None, chat.markup)
    found = blocks(parser.push(shown) + parser.finish())
    assert found == [("call", "weather", '{"city": "Paris"}')] * 2
    assert shown == chat.markup.write_calls([("weather", '{"city": "Paris"}')] * 2)
    assert prompt.index(end) < prompt.index("wet") < prompt.index("Yes.")


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v31", "kimi_k2", "objects", None])
def test_nothing_of_a_conversation_is_lost(load: Any, name: str | None) -> None:
    said = CALLING | {"content": "I look."}
    system = {"role": "system", "content": "Be kind."}
    prompt = load(name).render(Turn([system, ASK, said, RESULT], [WEATHER]))
    for text in ("Be kind.", "Is it raining?", "I look.", '"city": "Paris"', "wet", "Looks outside."):
        assert prompt.count(text) == 1, text
    assert prompt.index("I look.") < prompt.index('"city": "Paris"') < prompt.index("wet")


def test_a_template_that_lists_tools_gets_them_and_others_have_them_described(load: Any) -> None:
    kimi = load("kimi_k2").render(Turn([ASK], [WEATHER]))
    assert kimi.startswith('<|im_system|>tool_declare<|im_middle|>[{"type": "function"')
    plain = load("deepseek_v31").render(Turn([ASK], [WEATHER]))
    assert "### weather\nDescription: Looks outside." in plain
    assert DEEPSEEK_V31.write_calls([("NAME", "ARGUMENTS")]) in plain
    assert "weather" not in load("deepseek_v31").render(Turn([ASK], [WEATHER], choice="none"))


def test_whether_the_prompt_begins_reasoning(load: Any) -> None:
    chat = load("deepseek_v31")
    assert chat.reasons
    assert not begins_reasoning(chat.render(Turn([ASK])))
    assert begins_reasoning(chat.render(Turn([ASK], variables={"thinking": True})))
    assert begins_reasoning(load("deepseek_v3").render(Turn([ASK], variables={"reasoning": True})))


def test_an_answer_that_has_begun_is_continued(load: Any) -> None:
    said = {"role": "assistant", "content": "It"}
    chat = load("deepseek_v31")
    assert chat.render(Turn([ASK, said], continued=True)).endswith("<｜Assistant｜></think>It")
    thinking = chat.render(Turn([ASK, said], continued=True, variables={"thinking": True}))
    assert thinking.endswith("<｜Assistant｜><think>\n</think>\n\nIt")


def test_arguments_that_a_template_cannot_take(load: Any) -> None:
    broken = CALLING | {"tool_calls": [CALL | {"function": {"name": "weather", "arguments": "{"}}]}
    with pytest.raises(InputError, match="weather are not JSON"):
        load("objects").render(Turn([ASK, broken, RESULT]))


def test_without_a_chat_template(load: Any, tmp_path: Path) -> None:
    load(None)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    chat = ChatTemplate(Tokenizer(tmp_path, 8192))
    with pytest.raises(InputError, match="no chat template"):
        chat.render(Turn([ASK], [WEATHER]))
