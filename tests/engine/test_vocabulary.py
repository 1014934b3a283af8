"""What tokens are in bytes: the tokenizers library and Python's codec judge."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from expertmesh import InputError
from expertmesh.engine.vocabulary import Utf8, pieces, spelling_of
from expertmesh.llm import demo_model

SPECIAL = "<｜end▁of▁sentence｜>"
TEXTS = [
    "你好，世界。",
    "emoji 😀👩‍🚀",
    '{"a": "b\\n"}\n',
    "naïve café",
    "\u00a0\u00ad",
    "床前明月光",
    "ｆｕｌｌ　ｗｉｄｔｈ",
]


def byte_level() -> Tokenizer:
    """As DeepSeek-V3's: byte-level BPE with tokens of several characters, of parts of one, and added ones."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rust.train_from_iterator(TEXTS * 3, trainer)
    rust.add_special_tokens([AddedToken(SPECIAL, special=True)])
    rust.add_tokens([AddedToken("</think>", special=False), AddedToken("<｜tool｜>", special=False)])
    return rust


def byte_fallback() -> Tokenizer:
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "你": 259, "!": 260}
    rust = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return rust


@pytest.fixture(params=["byte_level", "byte_fallback", "demo"], scope="module")
def rust(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "demo":
        return Tokenizer.from_file(str(Path(demo_model()) / "tokenizer.json"))
    return byte_level() if request.param == "byte_level" else byte_fallback()


@given(st.text(max_size=20) | st.sampled_from([*TEXTS, "a</think>b<｜tool｜>c"]))
def test_pieces_together_are_the_text(text: str) -> None:
    for rust in (byte_level_once, byte_fallback_once):
        ids = rust.encode(text, add_special_tokens=False).ids
        found = pieces(rust, rust.get_vocab_size() + 5)
        assert b"".join(found[i] for i in ids).decode() == rust.decode(ids, skip_special_tokens=True) == text


byte_level_once, byte_fallback_once = byte_level(), byte_fallback()


def test_every_text_of_any_tokenizer(rust: Tokenizer) -> None:
    found = pieces(rust, rust.get_vocab_size())
    for text in TEXTS:
        ids = rust.encode(text, add_special_tokens=False).ids
        assert b"".join(found[i] for i in ids) == text.encode()


def test_special_tokens_and_gaps_have_no_text() -> None:
    rust = byte_level()
    found = pieces(rust, 400)
    assert found[rust.token_to_id(SPECIAL)] == b"" and found[399] == b""
    assert found[rust.token_to_id("<｜tool｜>")] == "<｜tool｜>".encode()


def test_tokens_that_are_no_pieces_are_refused() -> None:
    rust = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for decoder in (None, decoders.WordPiece()):
        if decoder is not None:
            rust.decoder = decoder
        with pytest.raises(InputError, match=r"^grammar needs a tokenizer"):
            spelling_of(rust)


def tokens_of(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def is_beginning(text: bytes) -> bool:
    """Whether some ending makes it valid UTF-8: by trying them."""
    endings = [b"", *(b"\x80" * n for n in range(1, 4)), *(b"\xbf" * n for n in range(1, 4))]
    for ending in endings:
        try:
            (text + ending).decode()
            return True
        except UnicodeDecodeError:
            pass
    return False


BYTES = [bytes([b]) for b in range(256)] + [
    b"\x80\x80",
    b"\xbfa",
    b"a\xe4",
    b"\xbd\xa0\xe5",
    b"\xc3\xa9",
    b"\x9f\x98",
    b"",
]


@given(st.text(max_size=2), st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), st.data())
def test_only_valid_utf8_goes_on(before: str, letter: str, data: st.DataObject) -> None:
    utf8, whole = Utf8(BYTES), before.encode() + letter.encode()
    cut = data.draw(st.integers(0, len(letter.encode())))
    text, pending = whole[: len(whole) - cut], b""
    for byte in text:
        assert byte in tokens_of(utf8.mask(pending))
        pending = utf8.after(pending, byte)
    assert tokens_of(utf8.mask(pending)) == {
        i for i, b in enumerate(BYTES) if (b or not pending) and is_beginning(text + b)
    }
