"""Mixture of experts (DeepSeek-V3, section 2.1.2): route my rows, dispatch, experts, combine, shared experts."""

from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.kernels import Kernels
from expertmesh.kernels.table import routing_of
from expertmesh.model.layers import Destinations, New
from expertmesh.model.step import Step
from expertmesh.weights import Shard


class MoE:
    """The expert layer with the norm before it. Routed experts live in slots; router and shared experts are whole."""

    def __init__(self, config: ModelConfig, layer: int, shard: Shard, kernels: Kernels, new: New) -> None:
        c = config
        self.config, self.layer, self.kernels, self.routing = c, layer, kernels, routing_of(c)
        self.slots = shard.slots[layer]
        self.norm = new("norm", c.hidden_size)
        # Scores decide who computes a row: they are never rounded to the model's type.
        self.router = new("router", c.n_routed_experts, c.hidden_size, float32=True)
        self.bias = new("bias", c.n_routed_experts, float32=True) if c.topk_method == "noaux_tc" else None
        width = c.moe_intermediate_size
        part = (self.slots, shard.own)
        slots, hidden = len(self.slots), c.hidden_size
        self.gate_up = new.matrix("gate_up", slots, 2 * width, hidden, split=2, kind="experts", part=part)
        self.down = new.matrix("down", slots, hidden, width, kind="experts", part=part)
        self.shared_width = width * c.n_shared_experts
        if self.shared_width:
            self.shared_gate_up = new.matrix("shared_gate_up", 2 * self.shared_width, c.hidden_size, split=2)
            self.shared_down = new.matrix("shared_down", c.hidden_size, self.shared_width)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        k = self.kernels
        x_TD = k.rms_norm(x_TD, self.norm, self.config.rms_norm_eps)
        experts_TK, weights_TK = k.router(x_TD, self.router, self.bias, self.routing)
        step.loads.record(self.layer, experts_TK, self.config.n_routed_experts)
        received = step.exchange.dispatch(self.layer, x_TD, experts_TK, weights_TK)
        y_RD = k.experts(received.x_RD, received.slots_RK, received.weights_RK, self.gate_up, self.down)
        y_TD = step.exchange.combine(y_RD, received)
        if self.shared_width:
            y_TD = k.add(y_TD, k.swiglu(x_TD, self.shared_gate_up, self.shared_down))
        return y_TD

    def weights(self) -> Destinations:
        width, shared = self.config.moe_intermediate_size, self.shared_width
        names: Destinations = {"post_attention_layernorm.weight": self.norm, "mlp.gate.weight": self.router}
        if self.bias is not None:
            names["mlp.gate.e_score_correction_bias"] = self.bias
        for slot, expert in enumerate(self.slots):
            if expert >= 0:
                names[f"mlp.experts.{expert}.gate_proj.weight"] = self.gate_up[slot, :width]
                names[f"mlp.experts.{expert}.up_proj.weight"] = self.gate_up[slot, width:]
                names[f"mlp.experts.{expert}.down_proj.weight"] = self.down[slot]
        if shared:
            names["mlp.shared_experts.gate_proj.weight"] = self.shared_gate_up[:shared]
            names["mlp.shared_experts.up_proj.weight"] = self.shared_gate_up[shared:]
            names["mlp.shared_experts.down_proj.weight"] = self.shared_down
        return names
