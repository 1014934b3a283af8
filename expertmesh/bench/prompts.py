"""Prompts of exact numbers of tokens, all different."""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from expertmesh.errors import InputError
from expertmesh.planner.arrivals import Arrival

# Short English words, which every vocabulary of a language model is likely to have whole, with a space before.
WORDS = (
    *(
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "was",
        "he",
        "for",
        "it",
        "with",
        "as",
        "his",
        "on",
        "be",
        "at",
        "by",
    ),
    *(
        "had",
        "not",
        "are",
        "but",
        "from",
        "or",
        "have",
        "an",
        "they",
        "which",
        "one",
        "you",
        "were",
        "her",
        "all",
    ),
    *(
        "she",
        "there",
        "would",
        "their",
        "we",
        "him",
        "been",
        "has",
        "when",
        "who",
        "will",
        "more",
        "no",
        "if",
    ),
)
PROBE = 64  # repetitions of a word, to learn whether each is one token
ENOUGH = 8  # words to make prompts of
Count = Callable[[dict[str, Any]], Awaitable[int]]


class Prompts(Protocol):
    """What a body says of its prompt."""

    @property
    def path(self) -> str: ...

    def fields(self, number: int, arrival: Arrival) -> dict[str, Any]:
        """Of request `number`; the same for the same number and length."""
        ...


@dataclass(frozen=True)
class TokenPrompts:
    """Token ids, for /completions: exact on any server that takes them. vocabulary: ids are drawn from its middle half,
    away from the special tokens at both ends. prefix: tokens that all prompts begin with, beside their own."""

    vocabulary: int
    prefix: int = 0
    seed: int = 0
    path: str = "/completions"

    def fields(self, number: int, arrival: Arrival) -> dict[str, Any]:
        shared = self._ids(0, self.prefix)
        return {"prompt": shared + self._ids(1 + number, arrival.input)}

    def _ids(self, stream: int, tokens: int) -> list[int]:
        low = self.vocabulary // 4
        high = max(low + 1, 3 * self.vocabulary // 4)
        ids: list[int] = np.random.default_rng([self.seed, 2, stream]).integers(low, high, tokens).tolist()
        return ids


@dataclass(frozen=True)
class WordPrompts:
    """One message of words, for /chat/completions. It begins with the first word, which may be of any length there; the
    words after it are a token each. overhead: tokens of the first word and the chat template, as `calibrate` finds."""

    words: Sequence[str]
    overhead: int
    prefix: int = 0
    seed: int = 0
    path: str = "/chat/completions"

    def fields(self, number: int, arrival: Arrival) -> dict[str, Any]:
        """Every prompt has at least one word of its own, so that the shortest are longer than asked for."""
        own = self._some(1 + number, max(1, arrival.input - self.overhead))
        return message(" ".join([self.words[0], *self._some(0, self.prefix), *own]))

    def _some(self, stream: int, tokens: int) -> list[str]:
        return random.Random(f"{self.seed} {stream}").choices(self.words, k=tokens)


def message(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def calibrate(count: Count, prefix: int, seed: int) -> WordPrompts:
    """Find words that are one token each, and what comes with them, by what the server counts. count: the prompt's
    tokens of a body. InputError where too few words are."""
    found: dict[str, int] = {}
    for word in WORDS:
        once = await count(message(word))
        if await count(message(" ".join([word] * (PROBE + 1)))) - once == PROBE:
            found[word] = once
        if len(found) == ENOUGH:
            return WordPrompts(tuple(found), next(iter(found.values())), prefix, seed)
    raise InputError(
        f"of {len(WORDS)} common words only {len(found)} are one token each to this server, so that prompts of exact "
        "lengths cannot be made of them; measure with --api completions, which sends token ids"
    )
