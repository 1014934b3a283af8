"""The whole model: embedding, layers, norm, head."""

import torch
from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.kernels import Kernels
from expertmesh.model.layers import DenseFFN, Destinations, Embedding, Head, prefixed
from expertmesh.model.mla import MLA
from expertmesh.model.moe import MoE
from expertmesh.model.step import Step
from expertmesh.weights import Shard


class DeepSeek:
    """One rank's part of a DeepSeek V2/V3 model. Weights are uninitialised until a loader has filled `weights()`."""

    def __init__(
        self, config: ModelConfig, shard: Shard, kernels: Kernels, dtype: torch.dtype, device: torch.device
    ) -> None:
        def new(*shape: int, float32: bool = False) -> Tensor:
            return torch.empty(shape, dtype=torch.float32 if float32 else dtype, device=device)

        self.config, self.kernels = config, kernels
        self.embedding = Embedding(config.vocab_size, config.hidden_size, shard, new)
        self.layers: list[tuple[MLA, MoE | DenseFFN]] = []
        for layer in range(config.num_hidden_layers):
            ffn: MoE | DenseFFN
            if config.is_moe(layer):
                ffn = MoE(config, layer, shard, kernels, new)
            else:
                width, eps = config.intermediate_size, config.rms_norm_eps
                ffn = DenseFFN(config.hidden_size, width, eps, shard, kernels, new)
            self.layers.append((MLA(config, layer, shard, kernels, new), ffn))
        self.norm = new(config.hidden_size)
        own_head = (
            self.embedding.weight if config.tie_word_embeddings else torch.empty_like(self.embedding.weight)
        )
        self.head = Head(own_head)

    def __call__(self, step: Step) -> Tensor:
        """Hidden state of every row after the last norm, [T, D]."""
        x_TD = self.embedding(step)
        for attention, ffn in self.layers:
            x_TD = x_TD + attention(x_TD, step)
            x_TD = x_TD + ffn(x_TD, step)
        return self.kernels.rms_norm(x_TD, self.norm, self.config.rms_norm_eps)

    def weights(self) -> Destinations:
        """Official tensor name -> where this rank keeps it, or its share of it."""
        names = {"model.embed_tokens.weight": self.embedding.weight, "model.norm.weight": self.norm}
        if not self.config.tie_word_embeddings:
            names["lm_head.weight"] = self.head.weight
        for layer, modules in enumerate(self.layers):
            for module in modules:
                names |= prefixed(f"model.layers.{layer}", module.weights())
        return names
