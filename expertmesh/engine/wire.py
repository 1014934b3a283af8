"""Batches for ranks of other processes, as plain data: of a request only what its TP group does not know yet.

The driver's `BatchWriter` and a rank's `BatchReader` keep the same picture of every request, as long as each message
that is written is read.
"""

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from expertmesh.request import Batch, Limits, Masks, Request, Sampled, SamplingParams, Slice, StepResult

Plain = dict[str, Any]


@dataclass
class _Known:
    """How much of a request the other side has: tokens, pages, and at how many preemptions (which take pages back)."""

    request: Request
    tokens: int
    pages: int
    preemptions: int


class BatchWriter:
    """Batches of one TP group to messages."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def write(self, batch: Batch) -> Plain:
        ended = [key for key, known in self._known.items() if known.request.finish_reason is not None]
        for key in ended:
            del self._known[key]
        return {"ended": ended, "slices": [self._slice(part) for part in batch.slices]}

    def _slice(self, part: Slice) -> Plain:
        request, known = part.request, self._known.get(part.request.id)
        message: Plain = {"id": request.id, "start": part.start, "count": part.count}
        if known is None:
            known = self._known[request.id] = _Known(request, 0, 0, request.preemptions)
            message |= {"new": _head(request)}
        if known.preemptions != request.preemptions:
            known.pages, known.preemptions = 0, request.preemptions
            message |= {"restart": True}
        # The rows of this step and the token after them, which prompt_logprobs judge.
        end = max(known.tokens, min(len(request.tokens), part.start + part.count + 1))
        message |= {"tokens": request.tokens[known.tokens : end], "pages": request.pages[known.pages :]}
        known.tokens, known.pages = end, len(request.pages)
        return message


FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
COUNTS = ("top_k", "logprobs", "prompt_logprobs")


def _head(request: Request) -> Plain:
    """What a runner and its sampler read of a request; when it ends is the scheduler's matter."""
    params = request.params
    counts = {name: getattr(params, name) for name in COUNTS}
    # Above every vocabulary, and within what a message holds.
    counts["top_k"] = min(params.top_k, 1 << 32)
    floats = {name: float(getattr(params, name)) for name in FLOATS}
    values = floats | counts | {"logit_bias": params.logit_bias}
    head = {"prompt_length": request.prompt_length, "seed": request.seed, "params": values}
    return head | ({"limits": astuple(request.limits)} if request.limits else {})


class BatchReader:
    """The other side: messages to batches over its own copies of the requests."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def read(self, message: Plain) -> Batch:
        for key in message["ended"]:
            del self._requests[key]
        return Batch(tuple(self._slice(item) for item in message["slices"]))

    def _slice(self, item: Plain) -> Slice:
        key = item["id"]
        if "new" in item:
            head = item["new"]
            params = SamplingParams(**head["params"])
            limits = Limits(*_tuples(head.get("limits", ())))
            self._requests[key] = Request(key, [], head["prompt_length"], params, head["seed"], limits=limits)
        request = self._requests[key]
        if "restart" in item:
            request.pages.clear()
        request.tokens += item["tokens"]
        request.pages += item["pages"]
        return Slice(request, item["start"], item["count"])


def _tuples(value: Any) -> Any:
    """Lists, which tuples arrive as, as tuples again."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def write_masks(batch: Batch) -> dict[str, bytes]:
    """A batch's masks, which only the rank that samples needs."""
    return {key: mask.tobytes() for key, mask in batch.masks.items()}


def read_masks(message: dict[str, bytes]) -> Masks:
    return {key: np.frombuffer(data, dtype=np.int32) for key, data in message.items()}


def write_result(result: StepResult) -> Plain:
    """What a TP group's first rank answers."""
    sampled = {key: [s.token, s.logprobs] for key, s in result.sampled.items()}
    return {"sampled": sampled, "prompt_logprobs": result.prompt_logprobs}


def read_result(message: Plain) -> StepResult:
    sampled = {key: Sampled(token, logprobs) for key, (token, logprobs) in message["sampled"].items()}
    return StepResult(sampled, message["prompt_logprobs"])
