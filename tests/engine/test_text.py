"""Output text against str.find on the whole text, however the text is split into tokens."""

from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from expertmesh.engine.text import OutputText
from expertmesh.engine.tokenizer import TextStream, Tokenizer
from tests.support.files import write_tokenizer

# Two letters, so that stop texts overlap with the text, with each other and with themselves.
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
splits = st.lists(st.text("ab", max_size=3) | st.text("abé🙂", max_size=9), max_size=12)


class Pieces(TextStream):
    """Token i is the i-th piece of a text; one more comes at the end."""

    def __init__(self, pieces: list[str], rest: str) -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.rest


def run(pieces: list[str], rest: str, stop: list[str]) -> tuple[OutputText, list[str]]:
    """The output and its deltas, of an engine that ends where a stop text is complete."""
    out, deltas = OutputText(Pieces(pieces, rest), stop), []
    for token in range(len(pieces)):
        deltas.append(out.push(token))
        assert "".join(deltas) == out.text
        if out.stopped:
            break
    deltas.append(out.finish())
    return out, deltas


def before_stop(text: str, stop: list[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


@given(splits, st.text("ab", max_size=3), stops)
@example(["a", "a", "b"], "", ["ab"])
@example(["aab"], "ab", ["abab"])
@example(["a"], "b", ["ab"])
@example(["a🙂b", "a"], "", ["ba", "🙂", "a"])
@example(["éab"], "", ["b", "a"])
def test_text_ends_before_the_earliest_stop_text(pieces: list[str], rest: str, stop: list[str]) -> None:
    # Inside another one a stop text is complete while the other, begun earlier, is not: then the split decides.
    assume(not any(inner in outer[1:] for inner in stop for outer in stop if inner != outer))
    whole = "".join(pieces) + rest
    out, deltas = run(pieces, rest, stop)
    assert out.text == "".join(deltas) == before_stop(whole, stop)
    assert out.stopped == any(s in whole for s in stop)


@given(splits, st.text("ab", max_size=3), stops)
def test_no_stop_text_is_in_the_text_and_one_comes_after_it(
    pieces: list[str], rest: str, stop: list[str]
) -> None:
    whole = "".join(pieces) + rest
    out, _ = run(pieces, rest, stop)
    assert not any(s in out.text for s in stop)
    if out.stopped:
        assert any(whole.startswith(out.text + s) for s in stop)
    else:
        assert out.text == whole


@given(splits, stops)
def test_all_is_released_at_once_but_what_may_begin_a_stop_text(pieces: list[str], stop: list[str]) -> None:
    out, so_far = OutputText(Pieces(pieces, ""), stop), ""
    for token, piece in enumerate(pieces):
        so_far += piece
        out.push(token)
        if out.stopped:
            return
        places = range(len(so_far))
        held = (at for at in places if any(s.startswith(so_far[at:]) for s in stop))
        assert out.text == so_far[: next(held, len(so_far))]


def test_held_text_comes_with_the_next_token_or_with_the_end() -> None:
    out = OutputText(Pieces(["x<", "/", "y</s", ">"], ""), ["</s>"])
    assert [out.push(0), out.push(1), out.push(2)] == ["x", "", "</y"]
    assert (out.finish(), out.text, out.stopped) == ("</s", "x</y</s", False)
    assert (out.finish(), out.text) == ("", "x</y</s")


def test_nothing_comes_after_a_stop_text() -> None:
    out = OutputText(Pieces(["ab", "end, and more"], "rest"), ["end"])
    assert [out.push(0), out.push(1)] == ["ab", ""] and out.stopped
    assert (out.finish(), out.text) == ("", "ab")


def test_without_a_tokenizer_there_is_no_text() -> None:
    out = OutputText(None, [])
    assert (out.push(5), out.finish(), out.text, out.stopped) == ("", "", "", False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder, 280)


@given(text=st.text("thei é🙂觉", max_size=12), stop=st.text("e é🙂觉", min_size=1, max_size=2))
def test_stop_texts_of_characters_that_span_tokens(tokenizer: Tokenizer, text: str, stop: str) -> None:
    out = OutputText(tokenizer.stream(), [stop])
    for token in tokenizer.encode(text, special=False):
        out.push(token)
        if out.stopped:
            break
    out.finish()
    assert (out.text, out.stopped) == (before_stop(text, [stop]), stop in text)


def test_stop_text_that_the_end_completes(tokenizer: Tokenizer) -> None:
    """An unfinished character is the replacement character, but only at the end."""
    out = OutputText(tokenizer.stream(), ["\ufffd"])
    tokens = tokenizer.encode("a🙂", special=False)[:-1]
    assert [out.push(token) for token in tokens] == ["a", "", "", ""]
    assert (out.finish(), out.text, out.stopped) == ("", "a", True)


@given(st.text("ab", max_size=12), stops, st.data())
def test_how_the_text_is_split_does_not_matter(whole: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    first, second = run(pieces, "", stop)[0], run(list(whole), "", stop)[0]
    assert (first.text, first.stopped) == (second.text, second.stopped)
