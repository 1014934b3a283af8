"""Random texts of a grammar over a small vocabulary of bytes and words, as a model without any idea writes them."""

import random
from functools import cache

import numpy as np
import xgrammar

from expertmesh.engine.grammar import check, compile_source, source_of
from expertmesh.engine.vocabulary import Utf8

WORDS = ('"', '":', '", "', '{"', '"}', "你", "12", "true", "null", '["', "ab", "  ", "\n")
PIECES = (
    [bytes([b]) for b in range(256)] + [word.encode() for word in WORDS] + [b"\xf0\x9f", b"\x98\x80", b""]
)
END = len(PIECES) - 1
CLOSING = {b'"', b"}", b"]", b",", b":", b'"}'}
UTF8 = Utf8(PIECES)


@cache
def compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo(
        PIECES, xgrammar.VocabType.RAW, vocab_size=len(PIECES), stop_token_ids=[END]
    )
    return xgrammar.GrammarCompiler(info, max_threads=1)


def walk(grammar: str, seed: int, most: int = 300) -> str | None:
    """A whole text; None where it had no end within so many tokens. What closes is taken more and more often."""
    source = source_of(grammar)
    check(source)
    matcher, chance = xgrammar.GrammarMatcher(compile_source(compiler(), source)), random.Random(seed)
    words = np.zeros((1, -(-len(PIECES) // 32)), dtype=np.int32)
    text, pending = b"", b""
    for number in range(most):
        matcher.fill_next_token_bitmask(words)
        bits = (words[0] & UTF8.mask(pending)).view(np.uint8)
        possible = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        closing = [t for t in possible if t == END or PIECES[t] in CLOSING]
        hurry = closing and chance.random() < 0.25 + number / most
        token = chance.choice(closing if hurry else possible)
        assert matcher.accept_token(token)
        if token == END:
            return text.decode()  # it is UTF-8
        text, pending = text + PIECES[token], UTF8.after(pending, token)
    return None
