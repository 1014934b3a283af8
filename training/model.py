"""DeepSeek-V3 architecture for training: MLA, DeepSeekMoE with loss-free balancing, one MTP layer.

Written for speed on few CPU cores: products in BF16 on FP32 master weights, the routed experts of a layer as one
autograd function, the head and its cross entropy fused. Mathematics follows arXiv:2412.19437 and the official files.

Shape suffixes: B rows of a batch, S positions, T = B*S tokens, D hidden, H heads, C latent, R rotary, N non-rotary,
E experts, K experts per token, P = T*K pairs (padded), I expert width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch._dynamo.config.recompile_limit = 64
PAD_ROWS = 64  # expert batches are padded to multiples of this, so that few matrix shapes occur


def yarn(config: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN inverse frequencies [R/2] and the softmax scale (arXiv:2309.00071, as in DeepSeek's modelling code)."""
    scaling, base, dim = config["rope_scaling"], config["rope_theta"], config["qk_rope_head_dim"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def correction(rotations: float) -> float:
        return float(dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base)))

    low = max(math.floor(correction(scaling["beta_fast"])), 0)
    high = min(math.ceil(correction(scaling["beta_slow"])), dim - 1)
    steps = torch.arange(0, dim, 2, dtype=torch.float32)
    plain = 1.0 / base ** (steps / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = plain / factor * ramp + plain * (1 - ramp)
    mscale = 0.1 * scaling["mscale_all_dim"] * math.log(factor) + 1.0
    return inverse, (config["qk_nope_head_dim"] + dim) ** -0.5 * mscale * mscale


def apply(function: Any, *inputs: Any) -> Tensor:
    """Call an autograd function (torch leaves `apply` without types)."""
    result: Tensor = function.apply(*inputs)
    return result


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in BF16."""
    return F.linear(x, weight.to(torch.bfloat16))


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension in FP32, output in BF16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the last dimension is normalised."""
        return rms_norm(x, self.weight, self.eps)


@torch.compile(dynamic=False)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as one fused loop forward and one backward."""
    x = x.float()
    return (weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))).to(torch.bfloat16)


class RoutedExperts(torch.autograd.Function):
    """All routed experts of one layer: sort the pairs by expert, one product per expert, weighted sum back.

    x [T, D] BF16, weights [T, K] FP32, index [T, K] int64, gate_up [E, 2I, D] and down [E, D, I] FP32 -> [T, D] BF16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        (tokens, width), per_token, experts = x.shape, index.shape[1], gate_up.shape[0]
        inner = down.shape[2]
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts)
        padded = (counts + PAD_ROWS - 1) // PAD_ROWS * PAD_ROWS
        starts = torch.cumsum(padded, 0) - padded
        first = torch.cumsum(counts, 0) - counts
        slot_of_sorted = torch.arange(flat.numel()) - first.repeat_interleave(counts)
        slot_of_sorted += starts.repeat_interleave(counts)
        total = flat.numel() + experts * PAD_ROWS  # an upper bound, so that the shapes of all steps are equal
        source = torch.zeros(total, dtype=torch.int64)  # token of every slot; padding slots read token 0
        source[slot_of_sorted] = order // per_token
        slot = torch.empty_like(flat)
        slot[order] = slot_of_sorted
        slot_weight = torch.zeros(total, dtype=torch.float32)  # weight 0 on padding
        slot_weight[slot] = weights.reshape(-1)
        bounds = [
            (e, s, s + n) for e, (s, n) in enumerate(zip(starts.tolist(), padded.tolist(), strict=True)) if n
        ]
        gate_up_bf16, down_bf16 = gate_up.to(torch.bfloat16), down.to(torch.bfloat16)
        sorted_x = x.index_select(0, source)
        hidden = x.new_empty(total, 2 * inner)
        for e, s, t in bounds:
            torch.mm(sorted_x[s:t], gate_up_bf16[e].t(), out=hidden[s:t])
        act = activate(hidden)
        out = x.new_empty(total, width)
        for e, s, t in bounds:
            torch.mm(act[s:t], down_bf16[e].t(), out=out[s:t])
        y = combine(out, slot.view(tokens, per_token), weights)
        ctx.save_for_backward(sorted_x, hidden, act, slot, slot_weight, source, gate_up_bf16, down_bf16)
        ctx.bounds, ctx.shape = bounds, (tokens, per_token)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sorted_x, hidden, act, slot, slot_weight, source, gate_up, down = ctx.saved_tensors
        bounds = ctx.bounds
        dy = grads[0].to(torch.bfloat16).index_select(0, source)
        dact = torch.empty_like(act)
        for e, s, t in bounds:
            torch.mm(dy[s:t], down[e], out=dact[s:t])
        dgate, dup, weighted_act, dslot_weight = activate_backward(hidden, act, dact, slot_weight)
        dhidden = torch.cat([dgate, dup], dim=-1)
        ddown, dgate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        dsorted = torch.empty_like(sorted_x)
        for e, s, t in bounds:
            torch.mm(dy[s:t].t(), weighted_act[s:t], out=ddown[e])
            torch.mm(dhidden[s:t].t(), sorted_x[s:t], out=dgate_up[e])
            torch.mm(dhidden[s:t], gate_up[e], out=dsorted[s:t])
        dx = combine(dsorted, slot.view(ctx.shape), None)
        return dx, dslot_weight[slot].view(ctx.shape), None, dgate_up.float(), ddown.float()


@torch.compile(dynamic=False)
def activate(hidden: Tensor) -> Tensor:
    """SwiGLU of [P, 2I] -> [P, I]."""
    gate, up = hidden.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(torch.bfloat16)


@torch.compile(dynamic=False)
def activate_backward(hidden: Tensor, act: Tensor, dact: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of gate and up [P, I], the weighted activation [P, I], and the gradient of the weights [P]."""
    gate, up = hidden.float().chunk(2, dim=-1)
    plain = dact.float()
    dweight = (plain * act.float()).sum(-1)
    scaled = plain * weight[:, None]
    sigmoid = torch.sigmoid(gate)
    dgate = scaled * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = scaled * gate * sigmoid
    weighted = (act.float() * weight[:, None]).to(torch.bfloat16)
    return dgate.to(torch.bfloat16), dup.to(torch.bfloat16), weighted, dweight


def combine(pairs: Tensor, slot: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of the K rows of each token: pairs [P, D], slot [T, K], weights [T, K] or None -> [T, D]."""
    scale = None if weights is None else weights.to(pairs.dtype)
    return F.embedding_bag(slot, pairs, mode="sum", per_sample_weights=scale)


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of a linear head, in chunks, without keeping logits.

    h [T, D] BF16, weight [V, D] FP32, target [T] -> scalar; gradients are computed in the forward pass.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        tokens = h.shape[0]
        head = weight.to(torch.bfloat16)
        dh, dweight = torch.empty_like(h), torch.zeros(head.shape, dtype=torch.float32)
        loss = torch.zeros(())
        buffer = head.new_empty(HeadLoss.CHUNK, head.shape[0])
        for start in range(0, tokens, HeadLoss.CHUNK):
            part = slice(start, min(start + HeadLoss.CHUNK, tokens))
            logits = torch.mm(h[part], head.t(), out=buffer[: part.stop - start])
            loss += softmax_loss(logits, target[part])
            torch.mm(logits, head, out=dh[part])
            dweight += torch.mm(logits.t(), h[part])
        ctx.save_for_backward(dh, dweight)
        ctx.tokens = tokens
        return loss / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh, dweight = ctx.saved_tensors
        scale = grads[0] / ctx.tokens
        return dh * scale.to(dh.dtype), dweight * scale, None


@torch.compile(dynamic=False)
def softmax_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Summed cross entropy of BF16 logits [T, V], which its gradient replaces in place."""
    peak = logits.amax(-1, keepdim=True).float()
    total = (logits.float() - peak).exp().sum(-1, keepdim=True)
    shift = peak + total.log()
    picked = logits.gather(1, target[:, None]).float()
    columns = torch.arange(logits.shape[1])
    grad = (logits.float() - shift).exp() - (columns[None, :] == target[:, None]).float()
    loss = (shift - picked).sum()
    logits.copy_(grad)
    return loss


class CausalAttention(torch.autograd.Function):
    """Causal attention as batched products over blocks of queries: 3 to 4 times faster here than the flash kernel.

    q and k [B*H, S, N + R], v [B*H, S, N] in BF16 -> [B*H, S, N]; the probabilities of a block are kept.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, kept = torch.empty_like(v), []
        for start in range(0, q.shape[1], CausalAttention.BLOCK):
            end = min(start + CausalAttention.BLOCK, q.shape[1])
            kept.append(causal_softmax(torch.bmm(q[:, start:end], k[:, :end].mT), scale))
            out[:, start:end] = torch.bmm(kept[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = torch.zeros(k.shape, dtype=torch.float32), torch.zeros(v.shape, dtype=torch.float32)
        for number, probability in enumerate(kept):
            start = number * CausalAttention.BLOCK
            end = start + probability.shape[1]
            dout = grads[0][:, start:end]
            dv[:, :end] += torch.bmm(probability.mT, dout)
            dscore = causal_softmax_backward(probability, torch.bmm(dout, v[:, :end].mT), ctx.scale)
            dq[:, start:end] = torch.bmm(dscore, k[:, :end])
            dk[:, :end] += torch.bmm(dscore.mT, q[:, start:end])
        return dq, dk.to(q.dtype), dv.to(q.dtype), None


@torch.compile(dynamic=False)
def causal_softmax(score: Tensor, scale: float) -> Tensor:
    """Softmax of the last queries' scores [B*H, Q, S] under the causal mask, in FP32, output in BF16."""
    queries, keys = score.shape[-2:]
    visible = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + (keys - queries)
    scaled = torch.where(visible, score.float() * scale, -math.inf)
    powers = (scaled - scaled.amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-1, keepdim=True)).to(torch.bfloat16)


@torch.compile(dynamic=False)
def causal_softmax_backward(probability: Tensor, grad: Tensor, scale: float) -> Tensor:
    """Gradient of the scores [B*H, Q, S]."""
    p, dp = probability.float(), grad.float()
    return ((dp - (p * dp).sum(-1, keepdim=True)) * p * scale).to(torch.bfloat16)


class Attention(nn.Module):
    """Multi-head latent attention with normalised input; [B, S, D] FP32 stream -> [B, S, D] BF16."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
        self.heads, self.nope, self.rope = heads, config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.value, self.latent = config["v_head_dim"], config["kv_lora_rank"]
        self.scale = yarn(config)[1]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.q_a_layernorm = RMSNorm(config["q_lora_rank"], eps)
        self.kv_a_layernorm = RMSNorm(self.latent, eps)
        self.q_a_proj = matrix(config["q_lora_rank"], hidden)
        self.q_b_proj = matrix(heads * (self.nope + self.rope), config["q_lora_rank"])
        self.kv_a_proj_with_mqa = matrix(self.latent + self.rope, hidden)
        self.kv_b_proj = matrix(heads * (self.nope + self.value), self.latent)
        self.o_proj = matrix(hidden, heads * self.value, 0.4)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, D], cos and sin [S, R/2]."""
        batch, length, _ = x.shape
        normed = self.input_layernorm(x)
        q = linear(self.q_a_layernorm(linear(normed, self.q_a_proj)), self.q_b_proj)
        q = q.view(batch, length, self.heads, self.nope + self.rope)
        compressed = linear(normed, self.kv_a_proj_with_mqa)
        latent, k_rope = compressed.split([self.latent, self.rope], dim=-1)
        kv = linear(self.kv_a_layernorm(latent), self.kv_b_proj)
        kv = kv.view(batch, length, self.heads, self.nope + self.value)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1).transpose(1, 2)
        k_rope = rotate(k_rope[:, :, None], cos, sin).expand(-1, -1, self.heads, -1)
        k = torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2)
        out = apply(
            CausalAttention, q.flatten(0, 1), k.flatten(0, 1), v.transpose(1, 2).flatten(0, 1), self.scale
        )
        out = out.view(batch, self.heads, length, self.value).transpose(1, 2).reshape(batch, length, -1)
        return linear(out, self.o_proj)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, halves out as in DeepSeek's code: x [B, S, H, R]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)


def matrix(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    """A normal-initialised weight [rows, columns]."""
    return nn.Parameter(torch.randn(rows, columns) * (gain * 0.7 * columns**-0.5))


class MLP(nn.Module):
    """Dense SwiGLU of BF16 input [T, D]."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = matrix(inner, hidden), matrix(inner, hidden)
        self.down_proj = matrix(hidden, inner, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return linear(F.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)


class Gate(nn.Module):
    """Sigmoid router with group-limited selection; the bias takes part in selection only."""

    bias: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        experts = config["n_routed_experts"]
        self.groups, self.top_groups = config["n_group"], config["topk_group"]
        self.top_k, self.scale = config["num_experts_per_tok"], config["routed_scaling_factor"]
        self.weight = matrix(experts, config["hidden_size"], 0.5)
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> weights [T, K] FP32 and experts [T, K]."""
        scores = torch.sigmoid(F.linear(x.float(), self.weight))
        choice = scores.detach() + self.bias
        grouped = choice.view(-1, self.groups, choice.shape[1] // self.groups)
        group_index = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.top_groups, dim=-1, sorted=False)[1]
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, group_index, True)
        choice = grouped.masked_fill(~allowed[..., None], float("-inf")).view_as(choice)
        index = choice.topk(self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, index)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, index


class MoE(nn.Module):
    """Routed experts plus one shared expert; `load` counts the tokens of every expert since it was cleared."""

    load: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner, experts = (
            config["hidden_size"],
            config["moe_intermediate_size"],
            config["n_routed_experts"],
        )
        self.gate = Gate(config)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * (0.7 * hidden**-0.5))
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * (0.28 * inner**-0.5))
        self.shared_experts = MLP(hidden, inner * config["n_shared_experts"])
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] BF16 -> [T, D] BF16."""
        weights, index = self.gate(x)
        self.load += torch.bincount(index.reshape(-1), minlength=self.load.numel())
        shared: Tensor = self.shared_experts(x)
        return shared + apply(RoutedExperts, x, weights, index, self.gate_up, self.down)


class Layer(nn.Module):
    """A decoder layer on the FP32 residual stream [B, S, D]."""

    def __init__(self, config: dict[str, Any], dense: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        hidden = config["hidden_size"]
        self.mlp: MLP | MoE = MLP(hidden, config["intermediate_size"]) if dense else MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(x, cos, sin)
        normed = self.post_attention_layernorm(x)
        output: Tensor = self.mlp(normed.view(-1, normed.shape[-1]))
        return x + output.view_as(x)


class Model(nn.Module):
    """The main model and its MTP layer; embedding and head are shared between them."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps, depth = config["hidden_size"], config["rms_norm_eps"], config["num_hidden_layers"]
        self.config = config
        self.embed_tokens = nn.Parameter(torch.randn(config["vocab_size"], hidden) * 0.05)
        self.lm_head = nn.Parameter(torch.randn(config["vocab_size"], hidden) * 0.02)
        self.layers = nn.ModuleList(
            [Layer(config, i < config["first_k_dense_replace"]) for i in range(depth)]
        )
        self.norm = RMSNorm(hidden, eps)
        self.mtp = Layer(config, dense=False)
        self.enorm, self.hnorm, self.mtp_norm = (
            RMSNorm(hidden, eps),
            RMSNorm(hidden, eps),
            RMSNorm(hidden, eps),
        )
        self.eh_proj = matrix(hidden, 2 * hidden)
        angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), yarn(config)[0])
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden_states(self, tokens: Tensor, mtp: bool = True) -> tuple[Tensor, Tensor | None]:
        """tokens [B, S + 1] -> main hidden [B, S, D] and MTP hidden [B, S, D], both after their final norm.

        The MTP layer at position i sees the main model's hidden state after the final norm and the embedding of
        token i + 1, embedding first, and predicts token i + 2.
        """
        embedded = F.embedding(tokens, self.embed_tokens)
        length = tokens.shape[1] - 1
        cos, sin = self.cos[:length], self.sin[:length]
        x = embedded[:, :length]
        for layer in self.layers:
            x = layer(x, cos, sin)
        hidden = self.norm(x)
        if not mtp:
            return hidden, None
        joined = torch.cat([self.enorm(embedded[:, 1:]), self.hnorm(hidden)], dim=-1)
        return hidden, self.mtp_norm(self.mtp(linear(joined, self.eh_proj).float(), cos, sin))

    def losses(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Main and MTP loss of rows [B, S + 2]."""
        hidden, ahead = self.hidden_states(rows[:, :-1])
        assert ahead is not None
        width = hidden.shape[-1]
        main = apply(HeadLoss, hidden.reshape(-1, width), self.lm_head, rows[:, 1:-1].reshape(-1))
        mtp = apply(HeadLoss, ahead.reshape(-1, width), self.lm_head, rows[:, 2:].reshape(-1))
        return main, mtp

    def moe_layers(self) -> list[MoE]:
        """The layers with experts, the MTP layer last."""
        return [layer.mlp for layer in [*self.layers, self.mtp] if isinstance(layer.mlp, MoE)]
