"""Write a trained state as an official-layout FP8 checkpoint (two shards and an index).

    python -m training.export --state DIR --demo expertmesh/demo

Projections are float8_e4m3fn in blocks of 128 x 128 with FP32 `weight_scale_inv` (w = q * scale); embeddings, heads,
norms, router weights and eh_proj are BF16; the routing bias is FP32, as in DeepSeek-V3's files. The MTP layer is
stored as layer `num_hidden_layers` with its own copies of embedding and head. `--bf16` skips the quantisation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.config import MODEL_CONFIG

BLOCK = 128
_QUANTISED = re.compile(
    r"(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$"
)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 E4M3 blocks: weight [R, C] -> values [R, C] and scales [ceil(R/128), ceil(C/128)], scale = amax / 448."""
    rows, columns = weight.shape
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    padded = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(grid[0], BLOCK, grid[1], BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0
    values = (blocks / scale[:, None, :, None]).clamp(-448.0, 448.0).reshape(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantise`, FP32 [R, C]."""
    rows, columns = values.shape
    grid = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * grid


def official_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training names to official names, FP32; expert stacks are split into one matrix per expert."""
    depth = int(MODEL_CONFIG["num_hidden_layers"])
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("embed_tokens", "lm_head"):
            result["model.embed_tokens.weight" if name == "embed_tokens" else "lm_head.weight"] = value
            layer_name = "embed_tokens.weight" if name == "embed_tokens" else "shared_head.head.weight"
            result[f"model.layers.{depth}.{layer_name}"] = value.clone()
            continue
        if name in ("enorm.weight", "hnorm.weight", "eh_proj", "mtp_norm.weight"):
            own = {"eh_proj": "eh_proj.weight", "mtp_norm.weight": "shared_head.norm.weight"}.get(name, name)
            result[f"model.layers.{depth}.{own}"] = value
            continue
        full = "model." + re.sub(r"^mtp\.", f"layers.{depth}.", name)
        full = full.replace("self_attn.input_layernorm", "input_layernorm")
        if full.endswith("mlp.gate_up"):
            for expert, stacked in enumerate(value):
                gate, up = stacked.chunk(2)
                prefix = full.replace("gate_up", f"experts.{expert}")
                result[f"{prefix}.gate_proj.weight"], result[f"{prefix}.up_proj.weight"] = gate, up
        elif full.endswith("mlp.down"):
            for expert, down in enumerate(value):
                result[f"{full.replace('down', f'experts.{expert}')}.down_proj.weight"] = down
        elif full.endswith("gate.bias"):
            result[full.replace("gate.bias", "gate.e_score_correction_bias")] = value
        else:
            result[full if full.endswith(".weight") else f"{full}.weight"] = value
    return result


def stored_tensors(state: dict[str, Tensor], fp8: bool) -> dict[str, Tensor]:
    """Official names with the dtypes of the official files."""
    stored: dict[str, Tensor] = {}
    for name, value in official_tensors(state).items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = value.float().contiguous()
        elif fp8 and _QUANTISED.search(name):
            stored[name], stored[f"{name}_scale_inv"] = quantise(value.to(torch.bfloat16))
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    return stored


def write_shards(stored: dict[str, Tensor], folder: Path, shards: int = 2) -> int:
    """Write the shards and the index beside and rename them; returns the total bytes."""

    def order(name: str) -> tuple[int, str]:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        return (int(match[1]) if match else (-1 if "embed" in name else 1000)), name

    total = sum(value.nbytes for value in stored.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    size = 0
    for name in sorted(stored, key=order):
        parts[min(size * shards // total, shards - 1)][name] = stored[name]
        size += stored[name].nbytes
    index: dict[str, str] = {}
    names: list[str] = []
    for number, part in enumerate(parts, 1):
        names.append(f"model-{number:05d}-of-{shards:06d}.safetensors")
        save_file(part, folder / f"{names[-1]}.tmp", metadata={"format": "pt"})
        index |= dict.fromkeys(part, names[-1])
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
    (folder / "model.safetensors.index.json.tmp").write_text(text, encoding="utf-8")
    for name in [*names, "model.safetensors.index.json"]:
        (folder / f"{name}.tmp").chmod(0o644)
        os.replace(folder / f"{name}.tmp", folder / name)
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--demo", type=Path, default=Path("expertmesh/demo"))
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    state = torch.load(args.state / "state.pt", weights_only=True, map_location="cpu")
    total = write_shards(stored_tensors(state["model"], not args.bf16), args.demo)
    print(f"step {state['step']}: {total / 1e6:.1f} MB in {args.demo}")


if __name__ == "__main__":
    main()
