"""What requests change of their rows of logits before a token is chosen: penalties, biases, tokens that may not come.

Each is an edit, a function of one row; a row gets those that its request asks for, in one order, and rows without any
stay as they are.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertmesh.request import Masks, Request

Mask: TypeAlias = NDArray[np.int32] | None


@dataclass(frozen=True)
class Edit:
    """applies: whether a request with this mask asks for it. apply: change its row [V] in place."""

    applies: Callable[[Request, Mask], bool]
    apply: Callable[[Tensor, Request, Mask], None]


def apply_edits(logits_BV: Tensor, requests: Sequence[Request], masks: Masks) -> Tensor:
    """Logits to choose from; those of the model are kept."""
    out = logits_BV
    for i, request in enumerate(requests):
        mask = masks.get(request.id)
        asked = [edit for edit in EDITS if edit.applies(request, mask)]
        if asked and out is logits_BV:
            out = logits_BV.clone()
        for edit in asked:
            edit.apply(out[i], request, mask)
    return out


def _repeats(request: Request, mask: Mask) -> bool:
    return request.params.repetition_penalty != 1


def _repetition(row_V: Tensor, request: Request, mask: Mask) -> None:
    """CTRL: logits of prompt and output tokens are divided or multiplied."""
    penalty = request.params.repetition_penalty
    seen = torch.tensor(sorted(set(request.tokens)), device=row_V.device)
    values = row_V[seen]
    scaled = torch.where(values > 0, values / penalty, values * penalty)
    row_V[seen] = scaled.nan_to_num()  # extreme penalties make infinities, whose difference is no number


def _counts(request: Request, mask: Mask) -> bool:
    p = request.params
    return bool((p.presence_penalty or p.frequency_penalty) and request.output_length)


def _presence_and_frequency(row_V: Tensor, request: Request, mask: Mask) -> None:
    """OpenAI's definition, over output tokens."""
    p = request.params
    # Counted on the host: how many there are of them is nothing to wait for a card for.
    found = Counter(request.tokens[request.prompt_length :])
    seen = torch.tensor(sorted(found), device=row_V.device)
    counts = torch.tensor([found[token] for token in sorted(found)], dtype=row_V.dtype, device=row_V.device)
    row_V[seen] -= p.presence_penalty + p.frequency_penalty * counts


def _is_biased(request: Request, mask: Mask) -> bool:
    return bool(request.params.logit_bias)


def _bias(row_V: Tensor, request: Request, mask: Mask) -> None:
    bias = request.params.logit_bias or {}
    row_V[torch.tensor(list(bias), device=row_V.device)] += torch.tensor(
        list(bias.values()), dtype=row_V.dtype, device=row_V.device
    )


def _is_masked(request: Request, mask: Mask) -> bool:
    return mask is not None or bool(request.limits.allowed)


def _mask(row_V: Tensor, request: Request, mask: Mask) -> None:
    """Tokens that the grammar, and allowed_token_ids where that leaves any, do not name get -inf. Bit by bit: eight
    tokens are one look into a table."""
    size = row_V.shape[0]
    may = mask.view(np.uint8)[: -(-size // 8)] if mask is not None else None
    if request.limits.allowed:
        some = np.zeros(size, dtype=bool)
        some[request.limits.allowed_ids] = True
        allowed = np.packbits(some, bitorder="little")
        both = allowed if may is None else allowed & may
        may = both if both.any() else may
    assert may is not None  # one of them is there
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = torch.from_numpy(np.where(bits == 1, 0.0, -np.inf).astype(np.float32)).to(row_V.device)
    added = table.index_select(0, torch.from_numpy(may.astype(np.int32)).to(row_V.device))
    row_V += added.flatten()[:size]


def _is_banned(request: Request, mask: Mask) -> bool:
    return bool(request.limits.early or request.limits.bad_words)


def _ban(row_V: Tensor, request: Request, mask: Mask) -> None:
    """Tokens that may not come yet, then those that complete a bad word, get -inf, unless nothing would be left."""
    length = request.output_length
    early = [token for count, tokens in request.limits.early if length < count for token in tokens]
    for tokens in (early, _last_of_bad_words(request)):
        ids = torch.tensor(tokens, dtype=torch.int64, device=row_V.device)
        before = row_V[ids]
        row_V[ids] = -torch.inf
        row_V[ids] = before.where(row_V.amax() == -torch.inf, -torch.inf)


def _last_of_bad_words(request: Request) -> list[int]:
    output = request.tokens[request.prompt_length :]
    return [
        ids[-1]
        for ids in request.limits.bad_words
        if len(ids) == 1 or tuple(output[1 - len(ids) :]) == ids[:-1]
    ]


# What forbids comes last, so that no bias undoes it.
EDITS = (
    Edit(_repeats, _repetition),
    Edit(_counts, _presence_and_frequency),
    Edit(_is_biased, _bias),
    Edit(_is_masked, _mask),
    Edit(_is_banned, _ban),
)
