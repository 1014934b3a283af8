"""Ops for a card in PyTorch's own operators that never wait for it: how many rows an expert has stays there. Slower
than kernels of our own, and there on every card.

Signatures and shapes are documented in `table`, semantics in `reference`.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu


def count(experts_TK: Tensor, counts_E: Tensor) -> None:
    chosen = experts_TK.flatten()
    counts_E.index_add_(0, chosen.clamp(min=0), (chosen >= 0).long())


def experts(
    x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Tensor, down_SDI: Tensor
) -> Tensor:
    """Pairs of a row and a slot, sorted by slot; those of no slot come last, where no product reads them."""
    (R, K), S = slots_RK.shape, gate_up_SID.shape[0]
    if not R:
        return torch.empty_like(x_RD)
    slots_P = slots_RK.flatten()
    order_P = slots_P.where(slots_P >= 0, S).argsort(stable=True)
    counts_S = torch.zeros(S, dtype=torch.int64, device=x_RD.device)
    count(slots_RK, counts_S)
    ends_S = counts_S.cumsum(0).to(torch.int32)
    gate, up = _products(x_RD[order_P // K], gate_up_SID, ends_S).chunk(2, dim=-1)
    y_PD = _products(silu(gate) * up, down_SDI, ends_S)
    # Behind the last pair is what was there before, which may be no number.
    mine = torch.arange(R * K, device=x_RD.device) < ends_S[-1]
    y_PD = torch.empty_like(y_PD).index_copy_(0, order_P, y_PD.where(mine.unsqueeze(1), 0))
    return torch.bmm(weights_RK.to(x_RD.dtype).unsqueeze(1), y_PD.view(R, K, -1)).squeeze(1)


def _products(x_PD: Tensor, weights_SXD: Tensor, ends_S: Tensor) -> Tensor:
    """Rows [ends[s - 1], ends[s]) times the weights of slot s, [P, X]; the others hold anything."""
    if x_PD.dtype == torch.bfloat16:  # the only type that cards have it for
        return grouped_mm(x_PD, weights_SXD.transpose(1, 2), offs=ends_S)
    place_P1 = torch.arange(x_PD.shape[0], device=x_PD.device).unsqueeze(1)
    out = x_PD.new_zeros(x_PD.shape[0], weights_SXD.shape[1])
    for slot, weights_XD in enumerate(weights_SXD):
        own = place_P1 < ends_S[slot]
        if slot:
            own = own & (place_P1 >= ends_S[slot - 1])
        out = torch.where(own, linear(x_PD, weights_XD), out)
    return out
