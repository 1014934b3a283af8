"""A choice as it grows, where its text is made: tokens come from the engine, outputs go to who answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from expertmesh.engine.text import OutputText
from expertmesh.request import FinishReason, Output, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One sequence to generate: its prompt's token ids and how to go on."""

    tokens: list[int]
    params: SamplingParams


class View(Sequence[T]):
    """The first items of a list that may grow, without a copy of them."""

    def __init__(self, items: list[T]) -> None:
        self._items, self._length = items, len(items)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._items[i] for i in range(*index.indices(self._length))]
        return self._items[range(self._length)[index]]

    def __iter__(self) -> Iterator[T]:
        return (self._items[i] for i in range(self._length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(_equal, self, other))

    def __repr__(self) -> str:
        return repr(list(self))


def _equal(one: object, other: object) -> bool:
    return one == other


@dataclass(eq=False)
class Growing:
    """One choice. changed: whether `output` would say something new."""

    key: str
    number: int
    job: Job
    text: OutputText
    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    cached: int = 0
    queued: float = 0.0
    reason: FinishReason | None = None
    changed: bool = False
    _told: int = 0  # characters

    def take(self, news: Sequence[Any]) -> bool:
        """What a frame says of it (`frames.TokenWriter`). Returns whether the engine has to be told that it has ended:
        tokens behind a stop text are no part of it."""
        tokens, logprobs, prompt_logprobs, self.cached, reason = news
        count, self.reason = self.text.take(tokens, reason)
        self.ids += tokens[:count]
        self.logprobs += (logprobs or [])[:count]
        if prompt_logprobs is not None:
            self.prompt_logprobs = prompt_logprobs
        self.changed = True
        return reason is None and self.reason is not None

    def output(self) -> Output:
        """All of it so far."""
        self.changed = False
        before, self._told = self._told, len(self.text.text)
        return Output(
            request_id=self.key,
            prompt=None,
            prompt_token_ids=self.job.tokens,
            text=self.text.text,
            token_ids=View(self.ids),
            finish_reason=self.reason,
            logprobs=View(self.logprobs) if self.job.params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=self.cached,
            delta=self.text.text[before:],
            queued=self.queued,
            stop_text=self.text.stop_text,
        )
