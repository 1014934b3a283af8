"""Rows as whole numbers of 8 bits with a scale each (W8A8), where a loader quantises weights for an accelerator."""

import torch
from torch import Tensor


def whole_rows(values: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """values [rows, K], of any type -> int8 [rows, K] and scales [rows], float32, that are exact in scale_dtype:
    rounded before numbers are divided by them."""
    values = values.float()
    scales = (values.abs().amax(dim=-1) / 127).clamp_min(1e-30).to(scale_dtype).float()
    return (values / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales
