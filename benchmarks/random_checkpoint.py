"""Write a random BF16 checkpoint of the DeepSeek-V3 architecture, to measure sizes for which there are no weights."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expertmesh.config import ModelConfig
from expertmesh.weights import describe

COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SIZES: dict[str, dict[str, Any]] = {
    # 39 M parameters
    "tinyr": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    # 1.29 B parameters, 284 M of them active
    "midr": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "q_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    fields = COMMON | SIZES[args.size]
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    config = ModelConfig.from_dict(fields)
    tensors = {}
    for weight in describe(config):
        if weight.name.endswith("e_score_correction_bias"):
            tensors[weight.name] = torch.zeros(weight.shape)
        elif weight.kind == "norm":
            tensors[weight.name] = torch.ones(weight.shape, dtype=torch.bfloat16)
        else:
            tensors[weight.name] = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, 0.02)
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.folder / "model.safetensors", metadata={"format": "pt"})
    (args.folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    print(f"{args.folder}: {sum(t.numel() for t in tensors.values()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
