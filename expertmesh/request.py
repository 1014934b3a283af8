"""What goes through the engine: sampling parameters, a request, a batch of token rows, an output."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expertmesh.errors import InputError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    temperature 0 takes the most likely token. top_k 0 and top_p 1 keep every token; min_p drops tokens less likely
    than min_p times the most likely one. Penalties: presence and frequency count output tokens (OpenAI's
    definition), repetition divides or multiplies the logits of prompt and output tokens (CTRL, Keskar et al. 2019).
    seed: makes a request's random numbers a function of the seed and the position alone. stop: texts that end the
    output and are not part of it. logprobs: how many most likely tokens to report at each position (the chosen one
    is always among them), of the model's own distribution, before penalties and temperature; 0 reports the chosen
    one alone. prompt_logprobs: the same for the prompt's tokens.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        one = isinstance(self.stop, str)
        object.__setattr__(
            self, "stop", (self.stop,) if one else self._tuple("stop", "texts that are not empty")
        )
        for name, kind in _SEVERAL.items():
            object.__setattr__(self, name, self._tuple(name, kind))
        if self.top_k == -1:  # vLLM's way to say: all of them
            object.__setattr__(self, "top_k", 0)
        self._check_number("max_tokens", 0, whole=True)
        self._check_number("temperature", 0)
        self._check_number("top_p", 0, 1)
        if self.top_p == 0:
            raise InputError("top_p is 0, but must be above 0 and at most 1")
        self._check_number("top_k", 0, whole=True)
        self._check_number("min_p", 0, 1)
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_number("repetition_penalty", 0)
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty is 0, but must be above 0")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_number(name, 0, whole=True)
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise InputError(f"seed is {self.seed!r}, but must be a whole number")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InputError("stop must be texts that are not empty")
        if not all(_is_token(i) for i in self.stop_token_ids):
            raise InputError("stop_token_ids must be token ids")
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}, but must be true or false")
        self._check_constraints()

    def _check_constraints(self) -> None:
        self._check_number("min_tokens", 0, whole=True)
        if self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}"
            )
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", self._tuple("allowed_token_ids", "token ids"))
            if not self.allowed_token_ids or not all(_is_token(i) for i in self.allowed_token_ids):
                raise InputError("allowed_token_ids must be token ids, at least one")
        if not all(isinstance(word, str) and word.strip() and _is_unicode(word) for word in self.bad_words):
            raise InputError("bad_words must be texts that are not empty")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.grammar is not None:
            _check_grammar(self.grammar)

    def _tuple(self, name: str, kind: str) -> tuple[Any, ...]:
        """A field that holds several values, None being none."""
        value = getattr(self, name)
        if value is not None and not isinstance(value, list | tuple | set | frozenset | range):
            raise InputError(f"{name} must be {kind}")
        return tuple(value or ())

    def _check_number(self, name: str, low: float, high: float = math.inf, whole: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
        if not good or (whole and not isinstance(value, int)) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise InputError(f"{name} is {value!r}, but must be {kind} {bound}")


_SEVERAL = {"stop_token_ids": "token ids", "bad_words": "texts that are not empty"}


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_unicode(text: str) -> bool:
    """Whether it has no halves of surrogate pairs, which no token stands for."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _bias(given: object) -> dict[int, float]:
    """A copy of logit_bias, checked."""
    if not isinstance(given, Mapping):
        raise InputError("logit_bias must be numbers by token id")
    for token, value in given.items():
        if not _is_token(token):
            raise InputError(f"logit_bias is for {token!r}, which is no token id")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -100 <= value <= 100:
            raise InputError(
                f"logit_bias of token {token} is {value!r}, but must be a number from -100 to 100"
            )
    return {int(token): float(value) for token, value in given.items()}


# What each type of grammar is given in, and the kind of JSON value that this is.
GRAMMARS: dict[str, tuple[str, type | tuple[type, ...], str] | None] = {
    "json_object": None,
    "json_schema": ("schema", (dict, bool), "a JSON schema"),
    "regex": ("pattern", str, "a text"),
    "ebnf": ("grammar", str, "a text"),
    "choice": ("choices", list, "a list of texts, at least one"),
    "structural_tag": ("format", dict, "an object"),
}


def read_grammar(text: str) -> dict[str, Any]:
    """A grammar's JSON text as an object, of a known type and with what that type needs. InputError otherwise."""
    if not isinstance(text, str):
        raise InputError('grammar must be JSON text, such as \'{"type": "json_object"}\'')
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"grammar has {len(text)} characters; at most {MOST_CHARACTERS} are possible")
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"grammar is not valid JSON: {error}") from None
    kind = spec.get("type") if isinstance(spec, dict) else None
    if not isinstance(kind, str) or kind not in GRAMMARS:
        raise InputError(f"grammar must be a JSON object whose type is one of {', '.join(GRAMMARS)}")
    if not _is_unicode(text) or not _is_unicode(json.dumps(spec, ensure_ascii=False)):
        raise InputError("grammar has halves of surrogate pairs, which no token stands for")
    if not _is_shallow(spec):
        raise InputError(f"grammar is nested more than {MOST_LEVELS} levels deep")
    needs = GRAMMARS[kind]
    if needs is not None and not isinstance(spec.get(needs[0]), needs[1]):
        raise InputError(f"grammar of type {kind} needs {needs[0]!r}: {needs[2]}")
    return dict(spec)


def _is_shallow(value: object) -> bool:
    """Whether no more than MOST_LEVELS objects and lists are inside of each other."""
    level = [value]
    for _ in range(MOST_LEVELS):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [item for items in inner for item in items]
    return not any(isinstance(v, dict | list) for v in level)


def _check_grammar(text: str) -> None:
    spec = read_grammar(text)
    choices, after = spec.get("choices"), spec.get("after", "</think>")
    if spec["type"] == "choice":
        if not choices or not all(isinstance(c, str) and c and _is_unicode(c) for c in choices):
            raise InputError("grammar of type choice needs 'choices': a list of texts, none of them empty")
        if len(choices) > MOST_CHOICES:
            raise InputError(f"grammar has {len(choices)} choices; at most {MOST_CHOICES} are possible")
    if not isinstance(after, str) or not after or not _is_unicode(after):
        raise InputError(
            "grammar's 'after' must be a text that is not empty: what comes before the constraint"
        )


MOST_CHARACTERS = 1 << 17  # the engine's thread reads it between two steps: a second or so at most
MOST_LEVELS = 256  # whatever follows a grammar into its depth has a stack that ends
MOST_CHOICES = 4096  # beyond that, the time to compile them grows with the square of their number


@dataclass(frozen=True)
class Limits:
    """Which tokens a request may not choose, in token ids; what a grammar allows changes with each token instead.

    allowed: no others, where there are any. early: (count, tokens): those do not come among the first `count`.
    bad_words: the last token of each does not come after the others.
    """

    allowed: tuple[int, ...] = ()
    early: tuple[tuple[int, tuple[int, ...]], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.allowed or self.early or self.bad_words)

    @cached_property
    def allowed_ids(self) -> NDArray[np.int64]:
        return np.array(self.allowed, dtype=np.int64)


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine. `computed` catches up with `tokens`: prefill, decoding, a prefix
    found in the cache and recomputation after a preemption are all the same thing."""

    id: str
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()
    limits: Limits = Limits()
    held: bool = False  # it waits for its grammar, and is not admitted before
    arrival: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    problem: str | None = None  # why it could not run, where that came out after it was queued
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    preemptions: int = 0
    cached_tokens: int = 0
    known: int = 0  # tokens of its beginning that were in the cache when it was queued
    queued: float = 0.0  # seconds that it waited for its first row

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length


# How many rows at the end of a prompt are computed as generated ones are, so that a few rows that follow a prefix found
# in the cache take little time.
TAIL = 16


@dataclass(frozen=True)
class Slice:
    """Token rows [start, start + count) of one request, computed in one step."""

    request: Request
    start: int
    count: int

    @property
    def tail(self) -> int:
        """How many of its rows, the last ones, attend over latents as they are, and not over keys expanded from them.
        What a row does depends on its place in the request alone, so that its bits are the same in any step."""
        begin = self.request.prompt_length - TAIL
        return max(0, min(self.count, self.start + self.count - begin))

    @property
    def decodes(self) -> bool:
        return self.count == self.tail == 1

    @property
    def samples(self) -> bool:
        """Whether the last row is the last known token, so that the next one is chosen."""
        return self.start + self.count == len(self.request.tokens)


# Which tokens may come, by request id: bit t % 32 of word t // 32 is token t.
Masks = Mapping[str, NDArray[np.int32]]


@dataclass(frozen=True)
class Batch:
    """The token rows of one step, those that decode first. masks: of requests that sample under a grammar."""

    slices: tuple[Slice, ...]
    masks: Masks = field(default_factory=dict)

    @staticmethod
    def of(slices: Iterable[Slice]) -> "Batch":
        return Batch(tuple(sorted(slices, key=lambda s: not s.decodes)))

    @property
    def rows(self) -> int:
        return sum(s.count for s in self.slices)


@dataclass(frozen=True)
class Sampled:
    """The token chosen for one request, and what was asked to be reported of the distribution."""

    token: int
    logprobs: dict[int, float] | None = None


@dataclass(frozen=True)
class StepResult:
    """What one step brought for the requests of a TP group, by request id: the tokens chosen, and what the model
    thought of those tokens of prompts that follow this step's rows (None for a prompt's first)."""

    sampled: dict[str, Sampled] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[dict[int, float] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What has come of a request: all of it so far, and what this step added.

    text holds no part of a stop text; token_ids are all generated ids, a stop token included. logprobs: for each
    generated token {token id: log-probability}, most likely first, the chosen one among them. queued: seconds that it
    waited in the engine for its first row. stop_text: the one that has ended it, if one has.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason | None
    logprobs: Sequence[dict[int, float]] | None = None
    prompt_logprobs: Sequence[dict[int, float] | None] | None = None
    cached_tokens: int = 0
    delta: str = ""
    queued: float = 0.0
    stop_text: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
