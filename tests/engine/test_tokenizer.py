"""Text to tokens and back against transformers, on the demo model's tokenizer and on a small one of bytes."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from expertmesh import InputError
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.llm import demo_model
from tests.support.files import MERGES, SPECIAL, write_tokenizer

DEMO_VOCABULARY, SMALL_VOCABULARY = 8192, len(SPECIAL) + 256 + len(MERGES)
HELLO = [{"role": "user", "content": "the <é>"}]
texts = st.text() | st.text("the in é🙂觉\u0301\ufffd\n<>", max_size=20)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(demo_model(), DEMO_VOCABULARY)


@pytest.fixture(scope="module")
def transformers_demo() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("small")
    write_tokenizer(folder)
    return Tokenizer(folder, SMALL_VOCABULARY)


def small_with(folder: Path, **config: Any) -> Tokenizer:
    write_tokenizer(folder, **config)
    return Tokenizer(folder, SMALL_VOCABULARY)


def change(folder: Path, edit: Callable[[RustTokenizer], None]) -> Tokenizer:
    """The small tokenizer with another tokenizer.json."""
    write_tokenizer(folder)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    edit(rust)
    rust.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder, SMALL_VOCABULARY)


def add_bos(rust: RustTokenizer) -> None:
    rust.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])


@given(text=texts)
def test_encoding_and_decoding_are_those_of_transformers(
    demo: Tokenizer, transformers_demo: Any, text: str
) -> None:
    ids = demo.encode(text)
    assert ids == transformers_demo(text)["input_ids"] and ids[0] == 0
    assert demo.encode(text, special=False) == ids[1:]
    assert demo.decode(ids) == transformers_demo.decode(ids, skip_special_tokens=True) == text


@given(ids=st.lists(st.integers(0, DEMO_VOCABULARY - 1)))
def test_any_tokens_decode_as_in_transformers(
    demo: Tokenizer, transformers_demo: Any, ids: list[int]
) -> None:
    assert demo.decode(ids) == transformers_demo.decode(ids, skip_special_tokens=True)


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    """After every token the text is that of all tokens so far, but for a character that may be unfinished."""
    stream, text = tokenizer.stream(), ""
    for count, token in enumerate(ids, 1):
        text += stream.push(token)
        whole = tokenizer.decode(ids[:count])
        assert text == whole or (whole.startswith(text) and whole.endswith("\ufffd"))
    assert text + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


@given(text=texts)
def test_stream_of_a_text(small: Tokenizer, demo: Tokenizer, text: str) -> None:
    for tokenizer in (small, demo):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        check_stream(tokenizer, ids)


@given(text=texts, cut=st.integers(1, 3))
def test_stream_of_a_text_that_ends_in_a_character(small: Tokenizer, text: str, cut: int) -> None:
    check_stream(small, small.encode(text + "🙂")[:-cut])


# Of the small tokenizer almost every id is one byte: most sequences are no valid UTF-8.
@given(ids=st.lists(st.integers(0, SMALL_VOCABULARY + 5)))
def test_stream_of_any_bytes_and_special_tokens_and_ids_without_a_text(
    small: Tokenizer, ids: list[int]
) -> None:
    check_stream(small, ids)


def test_stream_gives_a_character_with_its_last_byte(small: Tokenizer) -> None:
    stream = small.stream()
    assert [stream.push(token) for token in small.encode("a🙂b", special=False)] == [
        "a",
        "",
        "",
        "",
        "🙂",
        "b",
    ]
    assert stream.flush() == ""


def test_marks_of_calls_are_text_although_they_are_special(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.add_special_tokens(["<｜tool▁call▁begin｜>", "</think>", "<other>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, 280)
    text = "a</think>é🙂<｜tool▁call▁begin｜>the<other> b"
    ids = tokenizer.encode(text, special=False)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text.replace("<other>", "")
    begin = ids.index(tokenizer.token_id("<｜tool▁call▁begin｜>") or 0)
    cut = tokenizer.stream()  # a character that the mark cuts off is shown as what it is
    assert (
        "".join(map(cut.push, ids[: begin - 1] + ids[begin:])) == "a</think>é\ufffd<｜tool▁call▁begin｜>the b"
    )
    assert tokenizer.decode(ids) == "aé🙂the b"
    assert tokenizer.decode(ids, special=True) == text


def test_special_tokens_are_no_text_but_have_one(small: Tokenizer, demo: Tokenizer) -> None:
    assert small.encode("<user>the", special=False) == [2, small.encode("the", special=False)[0]]
    assert small.decode([0, 2, *small.encode("the", special=False), 1]) == "the"
    assert [small.token_text(token) for token in range(4)] == list(SPECIAL)
    think = demo.encode("<think>a</think>", special=False)
    assert demo.decode(think) == "<think>a</think>" and demo.token_text(think[0]) == "<think>"


@pytest.mark.parametrize("value", [True, False, None, "absent"])
@pytest.mark.parametrize("processor", [True, False])
def test_add_bos_token(tmp_path: Path, value: object, processor: bool) -> None:
    """The first token comes from tokenizer.json or by tokenizer_config.json; from both it comes once."""
    change(tmp_path, add_bos if processor else lambda _: None)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"add_bos_token": value}
    if value == "absent":
        del config["add_bos_token"]
    file.write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path, SMALL_VOCABULARY)
    plain = tokenizer.encode("the", special=False)
    assert len(plain) == 1 and plain != [0]
    assert tokenizer.encode("the") == ([0, *plain] if processor or value is True else plain)
    assert tokenizer.encode("") == ([0] if processor or value is True else [])


def test_bos_is_not_added_where_the_text_has_it(small: Tokenizer) -> None:
    assert small.encode("<bos>the") == small.encode("the")


def test_tokens_named_as_objects(tmp_path: Path) -> None:
    """transformers writes an AddedToken as an object with its flags."""
    tokenizer = small_with(
        tmp_path, bos_token={"content": "<bos>"}, eos_token={"content": "<eos>", "lstrip": False}
    )
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eos_token_id) == ("<bos>", "<eos>", 1)
    assert tokenizer.encode("the")[0] == 0
    assert tokenizer.render([{"role": "assistant", "content": "a"}]) == "<bos><assistant>a<eos><assistant>"


def test_named_tokens_that_do_not_exist(tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, bos_token="<begin>", eos_token=None)
    assert tokenizer.eos_token_id is None and tokenizer.encode("the") == tokenizer.encode(
        "the", special=False
    )
    assert small_with(tmp_path, eos_token="<end>").eos_token_id is None


def test_training_settings_of_the_file_are_ignored(tmp_path: Path) -> None:
    """A tokenizer.json that was saved while training may cut or fill every text."""

    def cut_and_fill(rust: RustTokenizer) -> None:
        rust.enable_truncation(3)
        rust.enable_padding(length=16)

    tokenizer = change(tmp_path, cut_and_fill)
    assert len(tokenizer.encode("abcdefgh", special=False)) == 8


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "Tell me a story about a fox."}],
    "system": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "你好，世界🙂"}],
    "systems": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "system", "content": "Be kind."},
    ],
    "turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\nIt is 2."},
        {"role": "user", "content": " And  <b>2 & 2</b>?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "{{ bos_token }}<｜User｜>"},
    ],
    "assistant_first": [{"role": "assistant", "content": ""}, {"role": "user", "content": ""}],
    "other_fields": [{"role": "user", "content": "a", "name": "someone", "extra": [1, {"b": None}]}],
    "other_role": [{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_rendered_as_by_transformers(
    demo: Tokenizer, transformers_demo: Any, name: str
) -> None:
    messages = CONVERSATIONS[name]
    expected = transformers_demo.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert demo.render(messages) == expected
    ids = transformers_demo.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert demo.chat(messages) == ids and ids.count(0) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if loop.first %}\n    {{- m.role }}: {{ m.content | trim }}\n"
        "  {% endif %}\n{% endfor %}\n",
        "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
        "{% for m in messages %}{% if loop.index < 3 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ bos_token }}{{ messages | map(attribute='role') | join(',') }}{{ eos_token }}",
        "{{ add_generation_prompt }}{{ undefined_thing }}{{ messages[0].get('name', 'x') }}",
        "{{ messages[2].content.split('2')[0].upper() }}{{ messages[2]['content'] | escape }}",
        "{% macro say(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages[::-1] %}{{ say(m) }}{% endfor %}",
        "{% if thinking is defined and thinking %}think{% endif %}",
        "{{ messages[0].content.__class__ }}|{{ messages.__init__ }}|{{ ''|attr('__class__') }}",
    ],
)
def test_templates_are_rendered_as_by_transformers(
    tmp_path: Path, transformers_demo: Any, template: str
) -> None:
    messages, names = CONVERSATIONS["turns"], {"bos_token": "<b>", "eos_token": "<e>"}
    expected = transformers_demo.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False, thinking=True, **names
    )
    assert small_with(tmp_path, chat_template=template, **names).render(messages, thinking=True) == expected


def test_template_by_name_is_the_default_one(tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}x"},
    ]
    assert small_with(tmp_path, chat_template=templates).render(HELLO) == "<bos>x"
    assert not small_with(tmp_path, chat_template=templates[:1]).has_chat_template


def test_template_file_comes_before_the_one_in_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("é{{ messages[0].content }}", encoding="utf-8")
    assert small_with(tmp_path).render(HELLO) == "éthe <é>"
    tokenizer = small_with(tmp_path, chat_template=None)
    assert tokenizer.has_chat_template and tokenizer.render(HELLO) == "éthe <é>"


def test_no_template(tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, chat_template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.chat(HELLO)


def test_chat_adds_no_second_bos(small: Tokenizer) -> None:
    ids = small.chat(HELLO)
    assert ids[:2] == [0, 2] and ids[-1] == 3 and ids.count(0) == 1
    assert ids == small.encode(small.render(HELLO), special=False)


def test_variables_reach_the_template_and_no_other_rendering(tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, chat_template="{{ thinking }}")
    assert [tokenizer.render(HELLO, thinking="yes"), tokenizer.render(HELLO)] == ["yes", ""]


def test_strftime_now(tmp_path: Path) -> None:
    before = datetime.now().year
    assert (
        before
        <= int(small_with(tmp_path, chat_template="{{ strftime_now('%Y') }}").render(HELLO))
        <= before + 1
    )


def test_template_refuses_a_conversation(small: Tokenizer) -> None:
    with pytest.raises(InputError, match="no such role: robot"):
        small.render([*HELLO, {"role": "robot", "content": "a"}])


@pytest.mark.parametrize("message", ["the", None, 5, ["role", "user"], {}, {"content": "a"}])
def test_messages_are_objects_with_a_role(small: Tokenizer, message: Any) -> None:
    with pytest.raises(InputError, match="role and content"):
        small.render([*HELLO, message])


@pytest.mark.parametrize("content", [None, 5, ["a"], [{"type": "text", "text": "a"}]])
def test_content_that_the_template_cannot_use(demo: Tokenizer, content: Any) -> None:
    with pytest.raises(InputError, match="chat template cannot render"):
        demo.render([{"role": "user", "content": content}])
    with pytest.raises(InputError, match="chat template cannot render"):
        demo.render([{"role": "user"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages[0].__class__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% include 'tokenizer_config.json' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_sandbox(tmp_path: Path, template: str) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(InputError, match="chat template cannot render"):
        small_with(tmp_path, chat_template=template).render(messages)
    assert messages == HELLO


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__ }}", "{{ '{0.__class__}'.format('') }}", "{{ '{a.__class__}'.format_map({'a': ''}) }}"],
)
def test_sandbox_shows_nothing_of_the_inside(tmp_path: Path, template: str) -> None:
    assert small_with(tmp_path, chat_template=f"[{template}]").render(HELLO) == "[]"


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages", "{% endfor %}", "{{ 1 | no_such_filter }}", "{{ f() }}"]
)
def test_broken_template(tmp_path: Path, template: str) -> None:
    with pytest.raises(InputError, match="chat template cannot render"):
        small_with(tmp_path, chat_template=template).render(HELLO)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.of(tmp_path, SMALL_VOCABULARY) is None
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path, SMALL_VOCABULARY)


def test_no_tokenizer_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.of(tmp_path, SMALL_VOCABULARY)
    assert tokenizer is not None and not tokenizer.has_chat_template
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eos_token_id) == (None, None, None)
    assert tokenizer.decode(tokenizer.encode("the é")) == "the é"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"model": 5}', b"\xff\xfe", b'{"version": "1.0", "model": {}}'],
)
def test_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.of(tmp_path, SMALL_VOCABULARY)


def test_half_a_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path, SMALL_VOCABULARY)


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe", b"{'a': 1}"])
def test_broken_tokenizer_config(tmp_path: Path, content: bytes) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer(tmp_path, SMALL_VOCABULARY)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    largest = SMALL_VOCABULARY - 1
    Tokenizer(tmp_path, SMALL_VOCABULARY)
    with pytest.raises(
        InputError, match=f"token ids up to {largest}, but the model's vocabulary has {largest};"
    ):
        Tokenizer(tmp_path, largest)


def test_added_tokens_above_the_vocabulary(tmp_path: Path) -> None:
    def add(rust: RustTokenizer) -> None:
        rust.add_tokens(["<extra>"])

    with pytest.raises(InputError, match=f"token ids up to {SMALL_VOCABULARY}, "):
        change(tmp_path, add)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ range(10 ** 9) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_templates_that_fail_as_they_run_are_refused(template: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the chat template cannot render these messages"):
        small_with(tmp_path, chat_template=template).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools is not none %}TOOLS{% endif %}{% if documents is none %}-{% endif %}", "-"),
        ("{{ {'ü': 1} | tojson(ensure_ascii=False) }}{{ 'ü' | tojson(true) }}", '{"ü": 1}"\\u00fc"'),
        ("[{{ pad_token }}]", "[<eos>]"),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", "abxc"),
    ],
)
def test_what_transformers_gives_to_templates_is_there(template: str, expected: str, tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, chat_template=template, pad_token="<eos>")
    assert tokenizer.render([{"role": "user", "content": "x"}]) == expected


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text in UTF-8"):
        Tokenizer(tmp_path, 300)


@pytest.mark.parametrize("template", [5, ["a"], [{"name": "default", "template": 5}]])
def test_a_template_of_another_kind(template: object, tmp_path: Path) -> None:
    if template == ["a"]:
        assert not small_with(tmp_path, chat_template=template).has_chat_template
        return
    with pytest.raises(InputError, match="is not a text"):
        small_with(tmp_path, chat_template=template)


def test_token_names_that_are_no_text_name_nothing(tmp_path: Path) -> None:
    tokenizer = small_with(tmp_path, bos_token=5, eos_token={"content": 5}, add_bos_token=True)
    assert tokenizer.encode("x") and tokenizer.eos_token_id is None


def test_half_a_character_is_no_text(small: Tokenizer) -> None:
    for ask in (lambda: small.encode("\ud800"), lambda: small.chat([{"role": "user", "content": "\ud800"}])):
        with pytest.raises(InputError, match="surrogate"):
            ask()


@pytest.mark.parametrize("content", [b"[1]", b"[" * 100_000])
def test_a_tokenizer_config_that_is_no_object(content: bytes, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"not valid JSON|not an object"):
        Tokenizer(tmp_path, 300)
