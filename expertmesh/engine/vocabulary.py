"""What each token of a vocabulary adds to a text, in bytes. No torch."""

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer

from expertmesh.errors import InputError

Spelling: TypeAlias = Callable[[str], bytes]


def spelling_of(rust: RustTokenizer) -> Spelling:
    """How this tokenizer writes bytes as tokens. InputError where its tokens are not simply pieces of text."""
    decoder: dict[str, Any] = json.loads(rust.decoder.__getstate__()) if rust.decoder is not None else {}
    types = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    if types == {"ByteLevel"}:
        return _byte_level()
    if types & {"ByteFallback", "Metaspace"} and types <= {
        "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip",
    }:  # fmt: skip
        return _with_spaces
    raise InputError(
        "grammar needs a tokenizer whose tokens are pieces of text, byte by byte; this one's decoder is "
        f"{decoder.get('type')}"
    )


def pieces(rust: RustTokenizer, size: int) -> list[bytes]:
    """The bytes of each token id below `size`; none for special tokens, which no text shows, and for ids without a
    token. Tokens that were added stand for themselves."""
    spell, out = spelling_of(rust), [b""] * size
    for token, i in rust.get_vocab(with_added_tokens=True).items():
        out[i] = spell(token)
    for i, added in rust.get_added_tokens_decoder().items():
        out[i] = b"" if added.special else added.content.encode()
    return out


def _byte_level() -> Spelling:
    """Printable characters of Latin-1 stand for their bytes, those from U+0100 on for the other bytes, in their order
    (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table: Mapping[str, int] = {chr(b): b for b in printable} | {
        chr(256 + i): b for i, b in enumerate(hidden)
    }

    def spell(token: str) -> bytes:
        try:
            return bytes(table[letter] for letter in token)
        except KeyError:
            return token.encode()

    return spell


def _with_spaces(token: str) -> bytes:
    """SentencePiece: U+2581 is a space, <0x0A> a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode()


class Utf8:
    """Which tokens go on in valid UTF-8, as masks of bits: [W] words of 32 tokens.

    Grammars are about characters, and the library's are generous with the bytes of those beyond ASCII: overlong forms
    and surrogates would pass, and a text would have replacement characters, and more of them than were counted.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._continuing = [i for i, piece in enumerate(pieces) if piece and piece[0] & 0xC0 == 0x80]
        self._masks = {0: self._mask_of([i for i, piece in enumerate(pieces) if _rest(piece) is not None])}

    def mask(self, pending: bytes) -> NDArray[np.int32]:
        """Tokens that may follow the first bytes of a character, none where a character is complete."""
        key = _state(pending)
        if key not in self._masks:
            going_on = [i for i in self._continuing if _rest(pending + self._pieces[i]) is not None]
            self._masks[key] = self._mask_of(going_on)
        return self._masks[key]

    def after(self, pending: bytes, token: int) -> bytes:
        """What is pending after one more token."""
        return _rest(pending + self._pieces[token]) or b""

    def _mask_of(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        bits = np.zeros(-(-len(self._pieces) // 32) * 32, dtype=bool)
        bits[list(tokens)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


def _rest(text: bytes) -> bytes | None:
    """The bytes at the end of a character that is not complete; None where the text is not valid."""
    try:
        rest = text[codecs.utf_8_decode(text, "strict", False)[1] :]
    except UnicodeDecodeError:
        return None
    # The codec sees only at the third byte that this would be a surrogate.
    return None if rest[:1] == b"\xed" and rest[1:2] > b"\x9f" else rest


def _state(pending: bytes) -> int:
    """What may follow depends on how many bytes are missing, and after four first bytes on which it was."""
    if not pending:
        return 0
    length = 2 if pending[0] < 0xE0 else 3 if pending[0] < 0xF0 else 4
    return pending[0] if pending in (b"\xe0", b"\xed", b"\xf0", b"\xf4") else length - len(pending)
