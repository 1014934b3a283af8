"""Choosing tokens from logits, for a whole batch at once.

A request's random numbers are a function of its seed and the position of the token alone: the same request gives the
same text whatever else is in the batch, and after a preemption.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from types import MappingProxyType

import torch
from torch import Tensor

from expertmesh.engine.edits import apply_edits
from expertmesh.request import Masks, Request, Sampled


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one token of one request: 53 bits of a hash, so no state is kept."""
    digest = blake2b(struct.pack("<q", position), key=struct.pack("<q", seed), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / float(1 << 53)


def fold_seed(seed: int) -> int:
    """Any whole number to the 64 bits that `uniform` takes."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def sample(
    logits_BV: Tensor, requests: Sequence[Request], masks: Masks = MappingProxyType({})
) -> list[Sampled]:
    """One token for each request from its row of float32 logits. masks: which tokens may come, by request id, of those
    with a grammar."""
    raw = logits_BV
    logits_BV = apply_edits(logits_BV, requests, masks)
    tokens = logits_BV.argmax(dim=-1)
    random = [i for i, r in enumerate(requests) if r.params.temperature > 0]
    if random:
        every = len(random) == len(requests)
        rows = logits_BV if every else logits_BV[random]
        drawn = draw(rows, [requests[i] for i in random])
        tokens = drawn if every else tokens.index_copy(0, torch.tensor(random, device=tokens.device), drawn)
    chosen = tokens.tolist()
    asked = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    reports = {}
    if asked:
        counts = [requests[i].params.logprobs or 0 for i in asked]
        found = top_logprobs(raw[asked], [chosen[i] for i in asked], counts)
        reports = dict(zip(asked, found, strict=True))
    return [Sampled(token, reports.get(i)) for i, token in enumerate(chosen)]


def draw(logits_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    """Random tokens by inversion: the place of one uniform number in the cumulated probabilities. Returns [B].

    Rows that drop unlikely tokens are cumulated from the most likely token on, the others in the order of the
    vocabulary, which saves the sort: which of the two depends on the request alone.
    """
    # Very low temperatures make infinite logits; relative to the largest they stay defined.
    logits = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).double()
    logits = logits / _column([r.params.temperature for r in requests], logits)
    cutting = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in (r.params for r in requests)]
    tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
    whole = [i for i, cuts in enumerate(cutting) if not cuts]
    if whole:
        tokens[whole] = _invert(logits[whole].softmax(dim=-1), [requests[i] for i in whole])
    cut = [i for i, cuts in enumerate(cutting) if cuts]
    if cut:
        some = [requests[i] for i in cut]
        values, order = logits[cut].sort(dim=-1, descending=True, stable=True)
        places = _invert(_drop_unlikely(values.softmax(dim=-1), some), some)
        tokens[cut] = order.gather(-1, places.unsqueeze(-1)).squeeze(-1)
    return tokens


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(-1)


def _drop_unlikely(probabilities_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    """top_k, then top_p, then min_p, each of the distribution that the one before left. Most likely first."""
    p, params = probabilities_BV, [r.params for r in requests]
    rank = torch.arange(p.shape[-1], device=p.device)
    p = p.masked_fill(rank >= _column([float(q.top_k or p.shape[-1]) for q in params], p), 0)
    p = p / p.sum(dim=-1, keepdim=True)
    # A token stays if those before it do not already hold top_p.
    before = p.cumsum(dim=-1) - p
    p = p.masked_fill(before >= _column([q.top_p if q.top_p < 1 else 2.0 for q in params], p), 0)
    return p.masked_fill(p < _column([q.min_p for q in params], p) * p[:, :1], 0)


def _invert(probabilities_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    cumulated = probabilities_BV.cumsum(dim=-1)
    u = _column([uniform(r.seed, len(r.tokens)) for r in requests], cumulated) * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, u, right=True).squeeze(-1)
    # Rounding may put u at the very end: then the last token that is possible.
    rank = torch.arange(probabilities_BV.shape[-1], device=cumulated.device)
    last = rank.where(probabilities_BV > 0, 0).amax(dim=-1)
    return place.minimum(last)


def top_logprobs(logits_BV: Tensor, chosen: Sequence[int], counts: Sequence[int]) -> list[dict[int, float]]:
    """For each row {token: log-probability} of its `count` most likely tokens and of the chosen one, most likely
    first, of equal ones the lowest id: as greedy choice has it, whatever else is in the batch."""
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    out = []
    for logprobs, token, count in zip(logprobs_BV, chosen, counts, strict=True):
        found = _most_likely(logprobs, min(count, logprobs.shape[0])) if count else {}
        found.setdefault(token, float(logprobs[token]))
        out.append(found)
    return out


def _most_likely(logprobs_V: Tensor, count: int) -> dict[int, float]:
    """topk says nothing of equal values: all that reach the last one's are sorted instead."""
    last = logprobs_V.topk(count).values[-1]
    tokens = (logprobs_V >= last).nonzero().squeeze(-1)
    values, order = logprobs_V[tokens].sort(descending=True, stable=True)
    return dict(zip(tokens[order[:count]].tolist(), values[:count].tolist(), strict=True))
