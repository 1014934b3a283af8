"""What goes through the engine: sampling parameters, a request, a batch of token rows, an output."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

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

    def __post_init__(self) -> None:
        one = isinstance(self.stop, str)
        object.__setattr__(
            self, "stop", (self.stop,) if one else self._tuple("stop", "texts that are not empty")
        )
        object.__setattr__(self, "stop_token_ids", self._tuple("stop_token_ids", "token ids"))
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
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.stop_token_ids):
            raise InputError("stop_token_ids must be token ids")
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}, but must be true or false")

    def _tuple(self, name: str, kind: str) -> tuple[Any, ...]:
        """A field that holds several values, None being none."""
        value = getattr(self, name)
        if value is not None and not isinstance(value, list | tuple | set | frozenset):
            raise InputError(f"{name} must be {kind}")
        return tuple(value or ())

    def _check_number(self, name: str, low: float, high: float = math.inf, whole: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
        if not good or (whole and not isinstance(value, int)) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise InputError(f"{name} is {value!r}, but must be {kind} {bound}")


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


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
    arrival: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    preemptions: int = 0
    cached_tokens: int = 0

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


@dataclass(frozen=True)
class Batch:
    """The token rows of one step, those that decode first."""

    slices: tuple[Slice, ...]

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
    generated token {token id: log-probability}, most likely first, the chosen one among them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    cached_tokens: int = 0
    delta: str = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
