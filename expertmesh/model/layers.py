"""Embedding, head and the plain feed-forward layer, each with its share of the TP group's split."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.nn.functional import embedding, linear

from expertmesh.kernels import Kernels
from expertmesh.model.step import Step
from expertmesh.weights import Shard

# Makes an uninitialised tensor of a shape; the loader fills it. float32=True for what is never rounded.
New: TypeAlias = Callable[..., Tensor]
# Official tensor name -> the part of this rank's memory that it is loaded into.
Destinations: TypeAlias = dict[str, Tensor]


def prefixed(prefix: str, weights: Destinations) -> Destinations:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


class Embedding:
    """Token embedding, rows of the vocabulary split over the TP group."""

    def __init__(self, vocabulary: int, hidden: int, shard: Shard, new: New) -> None:
        self.part = shard.part(vocabulary, "vocab_size")
        self.vocabulary = vocabulary
        self.weight = new(len(self.part), hidden)

    def __call__(self, step: Step) -> Tensor:
        if len(self.part) == self.vocabulary:
            return embedding(step.tokens_T, self.weight)
        local = step.tokens_T - self.part.start
        mine = (local >= 0) & (local < len(self.part))
        rows = embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        return step.tp.reduce_scatter(rows)

    def weights(self) -> Destinations:
        return {"weight": self.weight}


class Head:
    """Logits of rows, float32 [T, vocabulary]. The vocabulary is split over the TP group like the embedding."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight = weight_VD

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        (x_TD,) = step.tp.all_gather(x_TD)
        return step.tp.all_gather_columns(linear(x_TD, self.weight)).float()


class DenseFFN:
    """SwiGLU with its width split over the TP group: gather the rows, compute my part, sum it back."""

    def __init__(self, hidden: int, width: int, eps: float, shard: Shard, kernels: Kernels, new: New) -> None:
        self.kernels, self.eps = kernels, eps
        self.norm = new(hidden)
        self.half = len(shard.part(width, "intermediate_size"))
        self.gate_up = new(2 * self.half, hidden)
        self.down = new(hidden, self.half)

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
