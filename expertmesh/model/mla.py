"""Multi-head latent attention (DeepSeek-V2, section 2.1), heads split over the TP group."""

from typing import Any

from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.kernels import Kernels
from expertmesh.kernels.places import de_interleaved
from expertmesh.model.layers import Destinations, New
from expertmesh.model.step import Step
from expertmesh.weights import Shard


class MLA:
    """The attention of one layer with the norm before it. `a` holds q_a and kv_a, so that one product serves both."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard, kernels: Kernels, new: New) -> None:
        c = config
        self.config, self.layer, self.kernels = c, layer, kernels
        self.heads = len(shard.part(c.num_attention_heads, "num_attention_heads"))
        self.first_tp_rank = shard.tp_rank == 0
        part = shard.tp_rank
        self.norm = new("norm", c.hidden_size)
        self.a = new.matrix("a", (c.q_lora_rank or 0) + c.latent_dim, c.hidden_size, kind="prologue")
        self.q_norm = new("q_norm", c.q_lora_rank) if c.q_lora_rank else None
        self.kv_norm = new("kv_norm", c.kv_lora_rank)
        queries = self.heads * c.qk_head_dim, c.q_lora_rank or c.hidden_size
        self.q_b = new.matrix("q_b", *queries, split=self.heads, kind="prologue", part=part)
        self.kv_b = new.latent_up(
            "kv_b", self.heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank, part=part
        )
        columns, cut = self.heads * c.v_head_dim, self.heads < c.num_attention_heads
        self.o = new.matrix("o", c.hidden_size, columns, cut=cut, part=part)
        self.a_bias = new("a_bias", self.a.shape[0]) if c.attention_bias else None
        self.o_bias = new("o_bias", c.hidden_size) if c.attention_bias else None

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        k, c, cache = self.kernels, self.config, step.cache[self.layer]
        down = (x_TD, self.norm, c.rms_norm_eps, self.a, self.a_bias, self.q_norm, self.kv_norm)
        up = (self.q_b, self.kv_b, step.rotary, step.rows, cache, self.heads)
        if step.tp.whole:
            queries = k.mla_prologue(*down, *up)
        else:
            # What is gathered is of low rank: 2,112 numbers a row of V3, not 7,168.
            c_q, c_kv, k_R = step.tp.all_gather(*k.mla_down(*down))
            queries = k.mla_up(c_q, c_kv, k_R, *up)
        out = k.mla_attention(queries, step.rows, cache, self.kv_b, c.softmax_scale, c.v_head_dim)
        # The bias is added once, by the first rank, before the sum over the group.
        return step.tp.reduce_scatter(k.linear(out, self.o, self.o_bias if self.first_tp_rank else None))

    def _place(self, rows: Any, heads: int = 1) -> Any:
        """For rows of heads that end with their rotary part, in the order that the kernels want."""
        if not (self.kernels.de_interleaved and self.config.rope_interleave):
            return rows
        return de_interleaved(rows, self.config.qk_rope_head_dim, heads)

    def weights(self) -> Destinations:
        q_lora = self.config.q_lora_rank or 0
        q_b = self._place(self.q_b, self.heads)
        names: Destinations = {
            "input_layernorm.weight": self.norm,
            "self_attn.kv_a_proj_with_mqa.weight": self._place(self.a[q_lora:]),
            "self_attn.kv_a_layernorm.weight": self.kv_norm,
            "self_attn.kv_b_proj.weight": self.kv_b,
            "self_attn.o_proj.weight": self.o,
        }
        if self.q_norm is None:
            names["self_attn.q_proj.weight"] = q_b
        else:
            names["self_attn.q_a_proj.weight"] = self.a[:q_lora]
            names["self_attn.q_a_layernorm.weight"] = self.q_norm
            names["self_attn.q_b_proj.weight"] = q_b
        if self.a_bias is not None and self.o_bias is not None:
            names["self_attn.kv_a_proj_with_mqa.bias"] = self._place(self.a_bias[q_lora:])
            names["self_attn.o_proj.bias"] = self.o_bias
            if q_lora:
                names["self_attn.q_a_proj.bias"] = self.a_bias[:q_lora]
        return names
