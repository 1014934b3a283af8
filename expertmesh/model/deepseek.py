"""The whole model: embedding, layers, norm, head."""

from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.kernels import Kernels
from expertmesh.model.layers import DenseFFN, Destinations, Embedding, Head, New, prefixed
from expertmesh.model.mla import MLA
from expertmesh.model.moe import MoE
from expertmesh.model.step import Step
from expertmesh.weights import Shard


class DeepSeek:
    """One rank's part of a DeepSeek V2/V3 model. Weights are uninitialised until a loader has filled `weights()`."""

    def __init__(self, config: ModelConfig, shard: Shard, kernels: Kernels, new: New) -> None:
        self.config, self.kernels = config, kernels
        self.embedding = Embedding(
            config.vocab_size, config.hidden_size, shard, kernels, new.inside("embedding")
        )
        self.layers: list[tuple[MLA, MoE | DenseFFN]] = []
        for layer in range(config.num_hidden_layers):
            ffn: MoE | DenseFFN
            ffn_new = new.inside(f"{layer}.ffn")
            if config.is_moe(layer):
                ffn = MoE(config, layer, shard, kernels, ffn_new)
            else:
                width, eps = config.intermediate_size, config.rms_norm_eps
                ffn = DenseFFN(config.hidden_size, width, eps, shard, kernels, ffn_new)
            self.layers.append((MLA(config, layer, shard, kernels, new.inside(f"{layer}.mla")), ffn))
        self.norm = new("norm", config.hidden_size)
        self.head = Head(
            self.embedding.weight
            if config.tie_word_embeddings
            else new.matrix("head", *self.embedding.weight.shape, kind="head", part=shard.tp_rank),
            kernels,
        )

    def __call__(self, step: Step) -> Tensor:
        """Hidden state of each of this rank's rows after the last norm, [T, D]."""
        x_TD = self.embedding(step)
        for attention, ffn in self.layers:
            x_TD = self.kernels.add(x_TD, attention(x_TD, step))
            x_TD = self.kernels.add(x_TD, ffn(x_TD, step))
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
