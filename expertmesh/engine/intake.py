"""What can be asked of a model: texts to tokens, sampling parameters, lengths. Checked before anything is queued. No
torch: whoever asks an engine in another process has an intake of his own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from expertmesh.config import ModelConfig, read_object
from expertmesh.engine.scheduler import check_length
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.errors import InputError
from expertmesh.request import Limits, SamplingParams

# A text, token ids, or chat messages.
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Intake:
    """generation: what the checkpoint's generation_config.json says. max_context: tokens of the longest request,
    prompt and output together."""

    folder: Path
    model: ModelConfig
    tokenizer: Tokenizer | None
    generation: Mapping[str, Any]
    max_context: int

    @classmethod
    def of(cls, folder: Path, model: ModelConfig) -> "Intake":
        """By the files of a checkpoint, for all of the model's positions. InputError where one cannot be used."""
        tokenizer = Tokenizer.of(folder, model.vocab_size)
        return cls(folder, model, tokenizer, _generation_config(folder), model.max_position_embeddings)

    def limited(self, max_context: int) -> "Intake":
        """The same for an engine that runs no longer requests than these."""
        return replace(self, max_context=max_context)

    @cached_property
    def eos(self) -> frozenset[int]:
        """Tokens that end an output."""
        eos = self.generation.get("eos_token_id")
        ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        ids |= set(self.model.eos_token_ids) if not ids else set()
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(token for token in ids if token in range(self.model.vocab_size))

    def default_params(self, **changes: Any) -> SamplingParams:
        """Sampling parameters that the checkpoint recommends in generation_config.json, with these changes."""
        given = {k: v for k, v in self.generation.items() if k in _GENERATION_FIELDS and v is not None}
        if self.generation.get("do_sample") is False:
            given["temperature"] = 0.0
        return SamplingParams(**(given | {k: v for k, v in changes.items() if v is not None}))

    def tokens(self, prompt: Prompt, **variables: Any) -> list[int]:
        """Token ids of a prompt, special tokens and chat template applied. variables: of the template."""
        form = _form(prompt)
        if form == "ids":
            return list(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise InputError(f"{self.folder}: has no tokenizer.json, so prompts must be token ids")
        if form == "text":
            return self.tokenizer.encode(prompt)  # type: ignore[arg-type]
        return self.tokenizer.chat(prompt, **variables)  # type: ignore[arg-type]

    def check(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """InputError where this request could not run. Whether a grammar can be followed is for the engine to say: that
        takes a library that needs torch."""
        vocabulary = range(self.model.vocab_size)
        wrong = [t for t in tokens if not isinstance(t, int) or isinstance(t, bool) or t not in vocabulary]
        if wrong:
            raise InputError(f"token id {wrong[0]!r} is outside the vocabulary of {self.model.vocab_size}")
        if params.stop and self.tokenizer is None:
            raise InputError("stop texts need a tokenizer, and this checkpoint has none; use stop_token_ids")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.model.vocab_size:
                raise InputError(f"{name} is more than the vocabulary of {self.model.vocab_size}")
        for name in ("logit_bias", "allowed_token_ids"):
            wrong = [token for token in getattr(params, name) or () if token not in vocabulary]
            if wrong:
                raise InputError(f"{name} has token {wrong[0]}, outside the vocabulary of {len(vocabulary)}")
        if params.bad_words and self.tokenizer is None:
            raise InputError("bad_words need a tokenizer, and this checkpoint has none")
        check_length(len(tokens), params.max_tokens, self.max_context)

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an output with these parameters; where a grammar is complete it ends in any case."""
        goes_on = params.ignore_eos and params.grammar is None
        return frozenset(params.stop_token_ids) | (frozenset() if goes_on else self.eos)

    def limits(self, params: SamplingParams) -> Limits:
        """What these parameters forbid, in token ids."""
        vocabulary = range(self.model.vocab_size)
        early = []
        if params.min_tokens:
            ends = self.eos | set(params.stop_token_ids)
            count = min(params.min_tokens, self.max_context)
            early.append((count, tuple(sorted(t for t in ends if t in vocabulary))))
        if params.ignore_eos and params.grammar is not None:
            early.append((self.max_context, tuple(sorted(self.eos))))
        words = self.tokenizer and [
            ids for word in params.bad_words for ids in self.tokenizer.spellings(word) if ids
        ]
        return Limits(params.allowed_token_ids or (), tuple(early), tuple(words or ()))


def _form(prompt: object) -> Literal["text", "ids", "chat"]:
    """What kind of prompt this is. InputError where it is none."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if all(isinstance(item, int) for item in prompt):
            return "ids"
        if all(isinstance(item, Mapping) for item in prompt):
            return "chat"
    raise InputError(f"a prompt must be a text, token ids or chat messages, not {str(prompt)[:60]!r}")


_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    data = read_object(path)
    eos = data.get("eos_token_id")
    if not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos or 0])):
        raise InputError(f"{path}: eos_token_id is {eos!r}, neither a token id nor a list of them")
    return data
