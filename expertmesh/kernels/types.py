"""What ops take besides tensors."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from expertmesh.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """How a router's logits become experts and weights (DeepSeek-V2, section 2.1.2; V3, section 2.1.2)."""

    experts_per_token: int
    groups: int
    groups_per_token: int
    method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    scoring: Literal["softmax", "sigmoid"]
    normalise: bool
    scale: float


@dataclass(frozen=True)
class Rotary:
    """Positions of the rows of a step [T], the table of cosines and sines of all positions (float32 [positions, P / 2]
    each), and how a head pairs its numbers.

    interleaved: pairs are (0, 1), (2, 3), ... as in DeepSeek's checkpoints; else (0, P/2), (1, P/2 + 1), ...
    """

    positions_T: Tensor
    cosines: Tensor
    sines: Tensor
    interleaved: bool

    @property
    def width(self) -> int:
        return 2 * self.cosines.shape[1]

    @cached_property
    def cos(self) -> Tensor:
        """Of the rows, [T, 1, P / 2]."""
        return self.cosines[self.positions_T, None]

    @cached_property
    def sin(self) -> Tensor:
        return self.sines[self.positions_T, None]

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rows for all numbers of a head in the order of halves, [T, P] each; made once."""
        if dtype not in self._whole:
            pair = (torch.cat((t, t), dim=-1).squeeze(1).to(dtype) for t in (self.cos, self.sin))
            self._whole[dtype] = (next(pair), next(pair))
        return self._whole[dtype]

    @cached_property
    def _whole(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        return {}


@dataclass(frozen=True)
class Queries:
    """Queries of my heads. The first rows of a step may be absorbed: in the space of the latents, [A, H, C + P]; the
    others are plain, [T - A, H, N + P]. Their rotary parts are rotated."""

    plain: Tensor
    absorbed: Tensor


@dataclass(frozen=True)
class Prefill:
    """One sequence with several rows in this step: rows [first, first + count) of the step are its last `count`
    known tokens; pages_M are its pages, which hold `length` tokens once this step's are written. The last `tail` rows
    attend over latents with absorbed queries, the others over keys and values expanded from them."""

    first: int
    count: int
    length: int
    pages_M: Tensor
    tail: int = 0

    def without_tail(self) -> "Prefill":
        return replace(self, count=self.count - self.tail, length=self.length - self.tail, tail=0)

    def only_tail(self) -> "Prefill":
        return replace(self, first=self.first + self.count - self.tail, count=self.tail)


@dataclass(frozen=True)
class AttentionRows:
    """Which sequences the rows of a step belong to. The first `decoding` rows are one each of as many sequences.

    slots_T: where a row's latent goes, in tokens from the start of the cache. pages_BM: pages of the decoding
    sequences, padded with page 0; lengths_B: their lengths, this step's token included.
    """

    slots_T: Tensor
    decoding: int
    pages_BM: Tensor
    lengths_B: Tensor
    prefills: tuple[Prefill, ...]

    @cached_property
    def known(self) -> list[int]:
        """lengths_B for ops that want them on the host."""
        lengths: list[int] = self.lengths_B.tolist()
        return lengths

    @cached_property
    def pages_int32(self) -> Tensor:
        return self.pages_BM.to(torch.int32)


def rotary_table(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [positions, P / 2] each, YaRN applied by its rope type."""
    dim = config.qk_rope_head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scale = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        scale = yarn.rotary_scale

        def pair_with(rotations: float) -> float:
            """The pair of numbers that turns so often within the original context (YaRN, section 3.2)."""
            turns = yarn.original_max_position / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(config.rope_theta))

        low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        interpolated = ramp.clamp(0, 1)
        frequencies = frequencies / yarn.factor * interpolated + frequencies * (1 - interpolated)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos() * scale, angles.sin() * scale
