"""Embedding, head and the plain feed-forward layer, each with its share of the TP group's split."""

from collections.abc import Callable, Hashable
from copy import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import embedding

from expertmesh.comm.base import Group
from expertmesh.config.precision import MatrixKind, Precision
from expertmesh.kernels import Kernels
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.packed import LatentUp, Weight
from expertmesh.model.step import Step
from expertmesh.weights import Shard

# Official tensor name -> the part of this rank's memory that it is loaded into: `copy_` of rows fills it.
Destinations: TypeAlias = dict[str, Any]
# A tensor, or what kernels keep weights in.
Made: TypeAlias = Any


class New:
    """Makes the memory of weights, uninitialised; the loader fills it.

    shared: where ranks of one process keep what they make, so that two that hold the same part of the same weight
    hold the same memory.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        shared: dict[Hashable, Made] | None = None,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
    ) -> None:
        self._kept, self._kernels, self._precision = Kept(dtype, device), kernels, precision
        self._shared: dict[Hashable, Made] = {} if shared is None else shared
        self._prefix = ""

    def inside(self, prefix: str) -> "New":
        """For the weights of one module: their names need not differ from those of others."""
        inner = copy(self)
        inner._prefix = f"{self._prefix}{prefix}."
        return inner

    def __call__(self, name: str, *shape: int, part: Hashable = None, float32: bool = False) -> Tensor:
        """A tensor. part: which part of the weight this rank holds, None for the whole. float32: for what is never
        rounded."""
        dtype = torch.float32 if float32 else None
        made: Tensor = self._once(name, shape, part, lambda: self._kept.empty(*shape, dtype=dtype))
        return made

    def matrix(
        self,
        name: str,
        *shape: int,
        split: int = 1,
        kind: MatrixKind = "linear",
        cut: bool = False,
        part: Hashable = None,
    ) -> Weight:
        """Weights of products, as these kernels want them (`kernels.table.Matrix`). kind, cut: what decides how they
        are kept (`config.precision`)."""
        format = self._precision.format(kind, shape[-1], cut)
        return self._once(name, shape, part, lambda: self._kernels.matrix(shape, split, format, self._kept))

    def latent_up(
        self, name: str, heads: int, nope: int, value: int, latent: int, part: Hashable = None
    ) -> LatentUp:
        """The up-projection of the latents, [heads * (nope + value), latent]."""
        sizes = heads, nope, value, latent
        return self._once(
            name, sizes, part, lambda: self._kernels.latent_up(heads, nope, value, latent, self._kept)
        )

    def _once(self, name: str, shape: tuple[int, ...], part: Hashable, make: Callable[[], Any]) -> Any:
        key = (self._prefix + name, shape, part)
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def prefixed(prefix: str, weights: Destinations) -> Destinations:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


class Embedding:
    """Token embedding, rows of the vocabulary split over the TP group."""

    def __init__(self, vocabulary: int, hidden: int, shard: Shard, kernels: Kernels, new: New) -> None:
        self.kernels = kernels
        self.part = shard.part(vocabulary, "vocab_size")
        self.vocabulary = vocabulary
        self.weight = new("weight", len(self.part), hidden, part=shard.tp_rank)

    def __call__(self, step: Step) -> Tensor:
        if len(self.part) == self.vocabulary:
            return self.kernels.embed(step.tokens_T, self.weight)
        local = step.tokens_T - self.part.start
        mine = (local >= 0) & (local < len(self.part))
        rows = embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        return step.tp.reduce_scatter(rows)

    def weights(self) -> Destinations:
        return {"weight": self.weight}


class Head:
    """Logits of rows that the whole TP group has, float32 [T, vocabulary]. The vocabulary is split over the group."""

    def __init__(self, weight_VD: Weight, kernels: Kernels) -> None:
        self.weight, self.kernels = weight_VD, kernels

    def __call__(self, x_TD: Tensor, tp: Group) -> Tensor | None:
        """On the group's first rank, which samples; the others send it their part."""
        if tp.whole:
            return self.kernels.logits(x_TD, self.weight)
        logits = tp.gather_columns(self.kernels.linear(x_TD, self.weight))
        return None if logits is None else logits.float()


class DenseFFN:
    """SwiGLU with its width split over the TP group: gather the rows, compute my part, sum it back."""

    def __init__(self, hidden: int, width: int, eps: float, shard: Shard, kernels: Kernels, new: New) -> None:
        self.kernels, self.eps = kernels, eps
        self.norm = new("norm", hidden)
        self.half = len(shard.part(width, "intermediate_size"))
        self.gate_up = new.matrix("gate_up", 2 * self.half, hidden, split=2, part=shard.tp_rank)
        self.down = new.matrix("down", hidden, self.half, cut=self.half < width, part=shard.tp_rank)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        (x_TD,) = step.tp.all_gather(self.kernels.rms_norm(x_TD, self.norm, self.eps))
        return step.tp.reduce_scatter(self.kernels.swiglu(x_TD, self.gate_up, self.down))

    def weights(self) -> Destinations:
        return {
            "post_attention_layernorm.weight": self.norm,
            "mlp.gate_proj.weight": self.gate_up[: self.half],
            "mlp.up_proj.weight": self.gate_up[self.half :],
            "mlp.down_proj.weight": self.down,
        }
