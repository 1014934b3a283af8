"""Random DeepSeek models made by transformers, the implementation that the engine is held against, and the
comparison: log-probabilities within a tolerance, the same tokens, and what to do where the reference itself
cannot tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from expertmesh import LLM, Output, SamplingParams
from tests.support.files import random_values

# Below this margin the reference's choice (of a token, an expert, a group) is a matter of rounding.
TIE = 1e-5
TOLERANCE = 1e-4

BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "qk_nope_head_dim": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def yarn(factor: float = 8.0, **more: float) -> dict[str, Any]:
    """rope_parameters of a model trained on 64 positions."""
    fast_slow = {"beta_fast": 32, "beta_slow": 1}
    fixed = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 64}
    return {"rope_parameters": fast_slow | fixed | more}


# Each family's name, then what differs from BASE. "bias" is the mean of the router's correction bias.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("V3", {}),
    "v3_eight_groups": (
        "V3",
        {"n_routed_experts": 32, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}
        | yarn(mscale=1.0, mscale_all_dim=1.0),
    ),
    "moonlight": (
        "V3",
        {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2, "rms_norm_eps": 1e-5}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ),
    "kimi_k2": (
        "V3",
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 12, "num_experts_per_tok": 4}
        | yarn(32.0, mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0),
    ),
    "yarn_two_mscales": ("V3", yarn(mscale=1.3, mscale_all_dim=0.8)),
    "yarn_no_mscale": ("V3", yarn()),
    "yarn_attention_factor": ("V3", yarn(attention_factor=0.9, mscale_all_dim=0.7)),
    "yarn_not_truncated": ("V3", yarn(truncate=False)),
    "unnormalised": ("V3", {"norm_topk_prob": False}),
    "no_dense_layer": ("V3", {"first_k_dense_replace": 0}),
    "two_dense_layers": ("V3", {"first_k_dense_replace": 2, "num_hidden_layers": 3}),
    "only_dense_layers": ("V3", {"first_k_dense_replace": 2}),
    "odd_sizes": (
        "V3",
        {"vocab_size": 101, "hidden_size": 60, "intermediate_size": 70, "moe_intermediate_size": 26, "kv_lora_rank": 18}
        | {"num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 22, "qk_rope_head_dim": 6}
        | {"v_head_dim": 14, "qk_nope_head_dim": 10, "n_routed_experts": 9, "n_group": 3, "topk_group": 2}
        | {"num_experts_per_tok": 3},
    ),
    "attention_bias": ("V3", {"attention_bias": True}),
    "attention_bias_no_q_lora": ("V3", {"attention_bias": True, "q_lora_rank": None}),
    "tied": ("V3", {"tie_word_embeddings": True}),
    "not_interleaved": ("V3", {"rope_interleave": False}),
    "negative_bias": (
        "V3",
        {"bias": -3.0, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "v2_lite": (
        "V2",
        {"topk_method": "greedy", "n_group": None, "topk_group": None, "q_lora_rank": None, "n_shared_experts": 2}
        | yarn(mscale=0.707, mscale_all_dim=0.707),
    ),
    "v2": (
        "V2",
        {"topk_method": "group_limited_greedy", "n_routed_experts": 16, "n_group": 4, "topk_group": 2}
        | {"num_experts_per_tok": 3, "routed_scaling_factor": 16.0, "n_shared_experts": 2}
        | yarn(mscale=0.707, mscale_all_dim=0.707),
    ),
    # Softmax scores are never normalised in DeepSeek's inference code, whatever this field says.
    "v2_norm_ignored": ("V2", {"topk_method": "greedy", "norm_topk_prob": True, "attention_bias": True}),
    "v2_tied": ("V2", {"topk_method": "greedy", "tie_word_embeddings": True, "first_k_dense_replace": 0}),
}  # fmt: skip


@dataclass
class Reference:
    """A model of transformers. Results are kept: many engines are compared on the same tokens."""

    model: Any
    known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] of every position, and [T]: the closest call of any router up to each."""
        key = tuple(tokens)
        if key not in self.known:
            margins: list[Tensor] = []
            hooks = [
                m.register_forward_hook(lambda gate, _, out: margins.append(routing_margin(gate, out[0])))
                for m in self.model.modules()
                if type(m).__name__.endswith("TopkRouter")
            ]
            with torch.inference_mode():
                logits = self.model(torch.tensor([tokens])).logits[0].clone()
            for hook in hooks:
                hook.remove()
            rows = torch.stack(margins).amin(0) if margins else torch.full((len(tokens),), math.inf)
            self.known[key] = (logits, rows.cummin(0).values)
        return self.known[key]


@dataclass
class Pair:
    """One set of weights: in transformers, and as a checkpoint in a folder."""

    reference: Reference
    folder: Path
    vocabulary: int


def routing_margin(gate: Any, logits_TE: Tensor) -> Tensor:
    """By how much the last chosen group and the last chosen expert of each row beat the next, [T]."""
    bias = getattr(gate, "e_score_correction_bias", None)
    scores = logits_TE.softmax(-1) if bias is None else logits_TE.sigmoid() + bias
    groups, kept = gate.num_group or 1, gate.topk_group or 1
    margin = torch.full((scores.shape[0],), math.inf)
    if groups > 1 and getattr(gate, "topk_method", "") != "greedy":
        grouped = scores.unflatten(-1, (groups, -1))
        best = grouped.topk(1 if bias is None else 2, dim=-1).values.sum(-1)
        margin = torch.minimum(margin, _margin(best, kept))
        inside = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(kept).indices, True)
        scores = grouped.masked_fill(~inside.unsqueeze(-1), -math.inf).flatten(-2)
    return torch.minimum(margin, _margin(scores, gate.top_k))


def _margin(scores: Tensor, chosen: int) -> Tensor:
    if chosen == scores.shape[-1]:
        return torch.full(scores.shape[:1], math.inf)
    best = scores.topk(chosen + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


def make_pair(name: str, folder: Path) -> Pair:
    """A random model of a variant, saved to the folder."""
    family, changes = VARIANTS[name]
    values = BASE | changes
    bias = values.pop("bias", 0.0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, f"Deepseek{family}Config")(**values)
    model = getattr(transformers, f"Deepseek{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")  # the others want sizes that are multiples of 16 bytes
    model.set_attn_implementation("eager")
    randomise(model, seed=sum(map(ord, name)), bias=bias)
    model.save_pretrained(folder)
    return Pair(Reference(model), folder, values["vocab_size"])


@torch.no_grad()
def randomise(model: nn.Module, seed: int, bias: float) -> None:
    """Every weight anew, in place of transformers' own small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tied = bool(model.config.tie_word_embeddings)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith("inv_freq"):
            tensor.copy_(random_values(name, tensor.shape, generator, bias, tied))


def greedy(vocabulary: int, max_tokens: int = 128, prompt: bool = False) -> SamplingParams:
    """Greedy, with every log-probability reported."""
    return SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=vocabulary,
        prompt_logprobs=vocabulary if prompt else None,
    )  # fmt: skip


def check_outputs(pair: Pair, outputs: Sequence[Output]) -> None:
    for output in outputs:
        check_output(pair, output)


def check_output(pair: Pair, output: Output) -> None:
    """The engine's tokens and log-probabilities are the reference's, position by position on the engine's own
    tokens. A difference is excused where the reference itself is undecided; the margin is printed."""
    tokens = output.prompt_token_ids + output.token_ids
    logits, margins = pair.reference(tokens[:-1])
    expected = logits.log_softmax(-1)
    given = _rows(output, pair.vocabulary)
    first = expected.shape[0] - given.shape[0]
    errors = (expected[first:] - given).abs().amax(-1)
    for row in range(first, expected.shape[0]):
        error = float(errors[row - first])
        if error > TOLERANCE:
            _excuse(f"row {row}: off by {error:.2g}", float(margins[row]))
        token = tokens[row + 1]
        if row + 1 >= len(output.prompt_token_ids) and int(expected[row].argmax()) != token:
            best = expected[row].topk(2).values
            _excuse(f"row {row}: token {token}", min(float(margins[row]), float(best[0] - best[1])))


def _rows(output: Output, vocabulary: int) -> Tensor:
    """Log-probabilities of every position that the output reports, [rows, V]."""
    reports = [r for r in output.prompt_logprobs or () if r is not None] + (output.logprobs or [])
    return torch.tensor([[report[token] for token in range(vocabulary)] for report in reports])


def _excuse(what: str, margin: float) -> None:
    print(f"{what}; the reference's own margin is {margin:.2g}")
    assert margin < TIE, f"{what}, and the reference was sure by {margin:.2g}"


def prompts_for(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def engine(pair: Pair, **options: Any) -> LLM:
    return LLM(pair.folder, dtype="float32", **options)
