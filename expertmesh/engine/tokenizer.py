"""Text to tokens and back, by the files of the checkpoint. A chat template runs in Jinja's sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import DecodeStream

from expertmesh.config import read_object
from expertmesh.engine import vocabulary
from expertmesh.engine.markup import MARKS
from expertmesh.errors import InputError

Message = Mapping[str, Any]


class Tokenizer:
    """tokenizer.json with the conventions of tokenizer_config.json: who adds the first token, the chat template."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        path = folder / "tokenizer.json"
        try:
            self._rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: cannot be read as a tokenizer ({error})") from None
        self._rust.no_truncation()
        self._rust.no_padding()
        largest = max(self._rust.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= vocab_size:
            raise InputError(
                f"{path}: has token ids up to {largest}, but the model's vocabulary has {vocab_size}; "
                "they do not belong together"
            )
        config = folder / "tokenizer_config.json"
        self._config = read_object(config) if config.is_file() else {}
        self.bos, self.eos = self._named("bos_token"), self._named("eos_token")
        self.template = self._chat_template(folder)
        added = self._rust.get_added_tokens_decoder()
        self._marks = {i: t.content for i, t in added.items() if t.special and t.content in MARKS}

    @staticmethod
    def of(folder: Path, vocab_size: int) -> "Tokenizer | None":
        """The folder's tokenizer; None where it has none, so that the model works with token ids."""
        return Tokenizer(folder, vocab_size) if (folder / "tokenizer.json").is_file() else None

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.eos) if self.eos else None

    def token_id(self, token: str) -> int | None:
        """The id of a token by its own text; None where there is none."""
        found: int | None = self._rust.token_to_id(token)
        return found

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special adds what the checkpoint puts before every text, the first token as a rule."""
        try:
            # Of several texts, since the library lets other threads of Python run then, and only then.
            (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=special)
        except TypeError:
            raise InputError("the prompt is not a text: it has halves of surrogate pairs") from None
        ids: list[int] = encoding.ids
        if special and self._config.get("add_bos_token") and self.bos:
            bos = self._rust.token_to_id(self.bos)
            if bos is not None and ids[:1] != [bos]:
                ids = [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids; special shows special tokens too."""
        return str(self._rust.decode(list(ids), skip_special_tokens=not special))

    def token_text(self, token: int) -> str:
        return str(self._rust.decode([token], skip_special_tokens=False))

    def check_pieces(self) -> None:
        """InputError where tokens are not simply pieces of text."""
        vocabulary.spelling_of(self._rust)

    def pieces(self, size: int) -> list[bytes]:
        """What each token id below `size` adds to a text; see `vocabulary.pieces`."""
        return vocabulary.pieces(self._rust, size)

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """Token ids of a word at the beginning of a text and after a space."""
        ids = (
            self._rust.encode(text, add_special_tokens=False).ids
            for text in (word.lstrip(), f" {word.lstrip()}")
        )
        return list(dict.fromkeys(map(tuple, ids)))

    def chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, up to where the assistant's turn begins."""
        return self.encode(self.render(messages, **variables), special=False)

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The conversation as text, by the checkpoint's own template."""
        if self.template is None:
            raise InputError("this checkpoint has no chat template; give the prompt as text or token ids")
        if not isinstance(messages, Sequence) or not all(
            isinstance(m, Mapping) and "role" in m for m in messages
        ):
            raise InputError("a chat message must be an object with role and content")
        named = {key: self._named(key) or "" for key in self._config if key.endswith("_token")}
        fixed = {
            "bos_token": "",
            "eos_token": "",
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._compiled.render(fixed | named | variables | {"messages": list(messages)})
        except Exception as error:  # whatever a stranger's template may do
            raise InputError(f"the chat template cannot render these messages: {error}") from None

    @cached_property
    def _compiled(self) -> Template:
        return _environment().from_string(self.template or "")

    def stream(self) -> "TextStream":
        return TextStream(self._rust, self._marks)

    def _named(self, key: str) -> str | None:
        value = self._config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None

    def _chat_template(self, folder: Path) -> str | None:
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{file}: is not a text in UTF-8 ({error})") from None
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {i.get("name"): i.get("template") for i in template if isinstance(i, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise InputError(f"{folder}: chat_template in tokenizer_config.json is not a text")
        return template


class TextStream:
    """Text of a growing sequence of tokens. A character that spans tokens comes when its last byte is there. Special
    tokens have no text, except marks of reasoning and of calls (token id -> its text)."""

    def __init__(self, rust: RustTokenizer, marks: Mapping[int, str]) -> None:
        self._rust, self._marks = rust, marks
        self._restart()

    def _restart(self) -> None:
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        if token in self._marks:
            before = self.flush()
            self._restart()
            return before + self._marks[token]
        self._ids.append(token)
        piece = self._decoder.step(self._rust, token) or ""
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """What was held back at the end: an unfinished character, shown as the replacement character."""
        rest = str(self._rust.decode(self._ids, skip_special_tokens=True))[self._length :]
        self._length += len(rest)
        return rest


class _Generation(Extension):
    """{% generation %} marks what the assistant says, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers offers to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
