"""A second reading of the papers and of DeepSeek's inference/model.py: dense, unpaged, in numpy and float64.

It shares nothing with the engine: rotary positions are complex numbers, keys and values are expanded, every token is
computed on its own. Slow, and meant to be compared with the paper line by line.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]


def logits_of(config: dict[str, Any], weights: Weights, tokens: list[int]) -> tuple[Array, float]:
    """Logits [T, V] of every position, and the smallest margin of any routing decision."""
    margins = [math.inf]
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        part = {k.split(".", 3)[3]: v for k, v in weights.items() if k.startswith(f"model.layers.{layer}.")}
        x = x + attention(config, part, norm(x, part["input_layernorm.weight"]))
        x = x + feed_forward(config, part, norm(x, part["post_attention_layernorm.weight"]), margins)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, weights["model.norm.weight"]) @ head.T, min(margins)


def norm(x: Array, weight: Array) -> Array:
    """inference/model.py knows no other epsilon than this one."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def turns(config: dict[str, Any], positions: int) -> npt.NDArray[np.complex128]:
    """[T, P / 2]: the rotation of every pair at every position, with YaRN where the context is longer than the
    original one (Peng et al. 2023, section 3.2)."""
    dim, base = config["qk_rope_head_dim"], config["rope_theta"]
    yarn = config.get("rope_scaling")
    speeds = np.array([base ** (-2 * pair / dim) for pair in range(dim // 2)])
    if yarn and config["max_position_embeddings"] > yarn["original_max_position_embeddings"]:
        original = yarn["original_max_position_embeddings"]

        def pair_turning(times: float) -> float:
            """The pair, as a real number, that turns so many times within the original context."""
            return dim / 2 * math.log(original / (times * 2 * math.pi), base)

        low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
        high = min(math.ceil(pair_turning(yarn["beta_slow"])), dim - 1)
        for pair in range(dim // 2):
            slowed = min(1.0, max(0.0, (pair - low) / ((high - low) or 0.001)))
            speeds[pair] *= (1 - slowed) + slowed / yarn["factor"]
    return np.exp(1j * np.outer(np.arange(positions), speeds))


def rotate(x: Array, rotations: npt.NDArray[np.complex128]) -> Array:
    """x [T, ..., P]: numbers 2i and 2i + 1 are one complex number."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.expand_dims(rotations, tuple(range(1, x.ndim - 1)))
    return np.stack((turned.real, turned.imag), -1).reshape(x.shape)


def attention(config: dict[str, Any], w: Weights, x: Array) -> Array:
    """Multi-head latent attention (DeepSeek-V2, equations 9 to 19)."""
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    nope, length = config["qk_nope_head_dim"], x.shape[0]
    if config["q_lora_rank"]:
        low = norm(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"])
        q = (low @ w["self_attn.q_b_proj.weight"].T).reshape(length, heads, -1)
    else:
        q = (x @ w["self_attn.q_proj.weight"].T).reshape(length, heads, -1)
    low = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    up = norm(low[:, :latent], w["self_attn.kv_a_layernorm.weight"]) @ w["self_attn.kv_b_proj.weight"].T
    kv = up.reshape(length, heads, -1)
    rotations = turns(config, length)
    q_rope, k_rope = rotate(q[..., nope:], rotations), rotate(low[:, latent:], rotations)
    out = np.zeros((length, heads, config["v_head_dim"]))
    for t in range(length):
        for h in range(heads):
            scores = kv[: t + 1, h, :nope] @ q[t, h, :nope] + k_rope[: t + 1] @ q_rope[t, h]
            out[t, h] = softmax(scores * softmax_scale(config)) @ kv[: t + 1, h, nope:]
    return out.reshape(length, -1) @ w["self_attn.o_proj.weight"].T


def softmax_scale(config: dict[str, Any]) -> float:
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = config.get("rope_scaling")
    if yarn and config["max_position_embeddings"] > yarn["original_max_position_embeddings"]:
        scale *= (0.1 * yarn["mscale"] * math.log(yarn["factor"]) + 1) ** 2
    return float(scale)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def swiglu(w: Weights, prefix: str, x: Array) -> Array:
    gate, up = x @ w[f"{prefix}.gate_proj.weight"].T, x @ w[f"{prefix}.up_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * up @ w[f"{prefix}.down_proj.weight"].T


def feed_forward(config: dict[str, Any], w: Weights, x: Array, margins: list[float]) -> Array:
    if "mlp.gate.weight" not in w:
        return swiglu(w, "mlp", x)
    out = swiglu(w, "mlp.shared_experts", x)
    for t, row in enumerate(x):
        logits = w["mlp.gate.weight"] @ row
        chosen = gate(config, logits, w.get("mlp.gate.e_score_correction_bias"), margins)
        for expert, weight in chosen.items():
            out[t] += weight * swiglu(w, f"mlp.experts.{expert}", row)
    return out


def gate(config: dict[str, Any], logits: Array, bias: Array | None, margins: list[float]) -> dict[int, float]:
    """Experts of one token and their weights (DeepSeek-V3, equations 13 to 16). The bias chooses, but does not
    weigh; groups not chosen are out of the question, however bad the others are."""
    sigmoid = config["scoring_func"] == "sigmoid"
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
    choice = scores if bias is None else scores + bias
    size = len(choice) // config["n_group"]
    candidates = list(range(len(choice)))
    if config["n_group"] > 1:
        members = [candidates[g * size : (g + 1) * size] for g in range(config["n_group"])]
        worth = [sum(sorted(choice[m])[-(1 if bias is None else 2) :]) for m in members]
        candidates = [e for g in best(worth, config["topk_group"], margins) for e in members[g]]
    picked = best([choice[e] for e in candidates], config["num_experts_per_tok"], margins)
    chosen = {candidates[i]: float(scores[candidates[i]]) for i in picked}
    total = sum(chosen.values()) if sigmoid else 1.0
    return {expert: score / total * config["routed_scaling_factor"] for expert, score in chosen.items()}


def best(values: list[float], count: int, margins: list[float]) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if count < len(values):
        margins.append(float(values[order[count - 1]] - values[order[count]]))
    return order[:count]
