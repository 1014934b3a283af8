"""Measure an exported checkpoint on the held-out texts and print a JSON report.

    python -m training.evaluate --demo expertmesh/demo --data DIR [--state DIR] [--rows 24] [--oracle] [--samples]

Per domain: perplexity per token and per character from the FP8 weights (and from the training state in BF16), how
often the MTP layer's first choice is the main model's next-next first choice, and the load of the experts.
`--oracle` loads the dequantised weights into transformers' DeepseekV3 in FP32 and compares the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.config import CONTEXT, MODEL_CONFIG
from training.export import dequantise, official_tensors, stored_tensors
from training.model import Model
from training.texts import DOMAINS, EOS

_PROMPTS = {
    "english": "<｜begin▁of▁sentence｜>The Golden Bird\n\nOnce upon a time",
    "chinese": "<｜begin▁of▁sentence｜>秋夜\n李白\n",
    "code": '<｜begin▁of▁sentence｜># mailbox\n"""',
    "chat, a tale": "<｜begin▁of▁sentence｜><｜User｜>Tell me a tale about a princess.<｜Assistant｜><think>\n",
    "chat, a poem": "<｜begin▁of▁sentence｜><｜User｜>写一首杜甫的诗。<｜Assistant｜><think>\n",
    "chat, code": "<｜begin▁of▁sentence｜><｜User｜>Write a Python function called read_lines.<｜Assistant｜><think>\n",
}


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors under their official names, dequantised to FP32."""
    raw: dict[str, Tensor] = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, framework="pt") as file:
            raw |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scales = {name for name in raw if name.endswith("_scale_inv")}
    return {
        name: dequantise(value, raw[f"{name}_scale_inv"]) if f"{name}_scale_inv" in scales else value.float()
        for name, value in raw.items()
        if name not in scales
    }


def load_model(official: dict[str, Tensor]) -> Model:
    """A training model filled from tensors under official names."""
    model = Model(MODEL_CONFIG)
    for name, value in official_tensors(
        model.state_dict()
    ).items():  # views of the state, but for the two copies
        value.copy_(official[name])
    return model.eval()


def heldout(data: Path, domain: str, rows: int) -> Tensor:
    """Rows [B, CONTEXT + 2] of held-out tokens."""
    stream = torch.from_numpy(np.load(data / f"heldout-{domain}.npy").astype(np.int64))
    return stream[: min(rows, (len(stream) - 2) // CONTEXT) * CONTEXT + 2].unfold(0, CONTEXT + 2, CONTEXT)


@torch.no_grad()
def measure(model: Model, rows: Tensor) -> dict[str, Any]:
    """Losses per token, MTP acceptance and expert loads of rows [B, CONTEXT + 2]."""
    for layer in model.moe_layers():
        layer.load.zero_()
    main_loss = mtp_loss = accepted = right = 0.0
    count = 0
    for row in rows.split(4):
        hidden, ahead = model.hidden_states(row[:, :-1])
        assert ahead is not None
        main_logits, mtp_logits = (F.linear(item.float(), model.lm_head) for item in (hidden, ahead))
        main_loss += F.cross_entropy(
            main_logits.flatten(0, 1), row[:, 1:-1].flatten(), reduction="sum"
        ).item()
        mtp_loss += F.cross_entropy(mtp_logits.flatten(0, 1), row[:, 2:].flatten(), reduction="sum").item()
        # The MTP guess at position i and the main model at position i + 1 both speak of token i + 2.
        accepted += (
            mtp_logits[:, :-1].argmax(-1) == main_logits[:, 1:].argmax(-1)
        ).float().mean().item() * len(row)
        right += (main_logits.argmax(-1) == row[:, 1:-1]).float().mean().item() * len(row)
        count += len(row)
    tokens = count * CONTEXT
    loads = [(layer.load / layer.load.sum()).tolist() for layer in model.moe_layers()]
    return {
        "tokens": tokens,
        "loss": main_loss / tokens,
        "mtp_loss": mtp_loss / tokens,
        "mtp_acceptance": accepted / count,
        "top1": right / count,
        "skew": [round(max(load) * len(load), 2) for load in loads],
        "share_of_top_8_experts": [round(sum(sorted(load)[-8:]), 3) for load in loads],
        "unused_experts": [sum(value == 0 for value in load) for load in loads],
        "loads": loads,
    }


def oracle_loss(official: dict[str, Tensor], rows: Tensor) -> float:
    """Mean loss of transformers' DeepseekV3 in FP32 on rows [B, CONTEXT + 2], main model only."""
    from transformers import AutoModelForCausalLM

    config = {key: value for key, value in MODEL_CONFIG.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        main = {
            name: value.contiguous()
            for name, value in official.items()
            if not re.match(r"model\.layers\.5\.", name)
        }
        save_file(main, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        total = 0.0
        for row in rows.split(2):
            logits = model(row[:, :-2]).logits
            total += F.cross_entropy(logits.flatten(0, 1), row[:, 1:-1].flatten(), reduction="sum").item()
    return total / (len(rows) * CONTEXT)


@torch.no_grad()
def sample(model: Model, tokenizer: Tokenizer, prompt: str, count: int, temperature: float, seed: int) -> str:
    """A sampled continuation (top-p 0.95), the whole sequence recomputed for every token."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    eos, start = tokenizer.token_to_id(EOS), len(ids)
    while len(ids) - start < count and (len(ids) == start or ids[-1] != eos):
        hidden, _ = model.hidden_states(torch.tensor([[*ids, 0]]), mtp=False)
        logits = F.linear(hidden[0, -1].float(), model.lm_head) / temperature
        probability, order = logits.softmax(-1).sort(descending=True)
        probability[(probability.cumsum(0) - probability) > 0.95] = 0
        ids.append(int(order[torch.multinomial(probability, 1, generator=generator)]))
    return tokenizer.decode(ids[start:], skip_special_tokens=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("expertmesh/demo"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--rows", type=int, default=24, help="held-out rows per domain")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--samples", action="store_true")
    args = parser.parse_args()
    torch.compiler.set_stance("force_eager")  # many lengths, few calls: not worth compiling
    facts = json.loads((args.data / "data.json").read_text())
    official = read_checkpoint(args.demo)
    model = load_model(official)
    report: dict[str, Any] = {}
    for name in DOMAINS:
        rows = heldout(args.data, name, args.rows)
        result = measure(model, rows)
        result["perplexity"] = math.exp(result["loss"])
        result["bits_per_character"] = result["loss"] / math.log(2) / facts[name]["characters_per_token"]
        result["perplexity_per_character"] = math.exp(result["loss"] / facts[name]["characters_per_token"])
        if args.oracle:
            result["oracle_loss_4_rows"] = oracle_loss(official, rows[:4])
            result["own_loss_4_rows"] = measure(model, rows[:4])["loss"]
        report[name] = result
    if args.state:
        state = torch.load(args.state / "state.pt", weights_only=True, map_location="cpu")
        bf16 = load_model(
            {name: value.float() for name, value in stored_tensors(state["model"], False).items()}
        )
        for name in DOMAINS:
            report[name]["bf16_loss"] = measure(bf16, heldout(args.data, name, args.rows))["loss"]
            report[name]["bf16_perplexity"] = math.exp(report[name]["bf16_loss"])
    if args.samples:
        tokenizer = Tokenizer.from_file(str(args.demo / "tokenizer.json"))
        report["samples"] = {
            name: [prompt, sample(model, tokenizer, prompt, 160, 0.7, 7)] for name, prompt in _PROMPTS.items()
        }
    print(json.dumps(report, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
