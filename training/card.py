"""Write the model card from the figures of training and evaluation.

python -m training.card --state DIR --data DIR --report report.json --demo expertmesh/demo
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training.config import CONTEXT, MODEL_CONFIG
from training.texts import DOMAINS

_HEAD = """---
license: apache-2.0
language: [en, zh]
library_name: expertmesh
tags: [deepseek_v3, moe, mtp, fp8, demo]
---

# ExpertMesh demo model

A {total:.1f}-million-parameter language model with DeepSeek-V3's architecture and file layout: small enough to travel
with the engine and to run on any machine, real enough that its routing, its acceptance of drafts and its FP8 weights
are those of a trained model. It was trained from scratch for ExpertMesh on two CPU cores. It is a demonstration of
an engine, not a useful assistant.

| | |
|---|---|
| Layers | {layers} (the first dense) and 1 multi-token prediction (MTP) layer, stored as layer {layers} |
| Hidden size, heads | {hidden}, {heads} |
| Latent attention | q_lora_rank {q}, kv_lora_rank {kv}, head widths {nope} + {rope} (rotary), values {v} |
| Experts | {experts} routed of width {width} in {groups} groups, {topk} per token from {top_groups} groups; 1 shared |
| Routing | sigmoid scores, noaux_tc with trained bias, normalised, factor {factor} |
| Positions | YaRN, factor 4 on {original}, up to {positions}; in force during the whole training on rows of {context} |
| Vocabulary | {vocab} byte-level BPE tokens |
| Weights | FP8 E4M3 in 128 x 128 blocks with FP32 scales; embedding, heads, norms, router and eh_proj BF16 |

The parameters counted are those trained; the files repeat embedding and head in the MTP layer, as the official ones
do. The MTP layer at position i takes the embedding of token i + 1 and the main model's hidden state at i after the
final norm (embedding first in `eh_proj`), as vLLM and SGLang run DeepSeek's weights; nothing is masked at position 0.

## Data

Three domains in equal parts of tokens, every row of {context} tokens from one domain:

| Domain | Source | Licence |
|---|---|---|
| English tales | Project Gutenberg numbers {gutenberg} | public domain in the USA |
| Chinese poems | chinese-poetry/chinese-poetry: Tang poems (traditional), Song ci (simplified) | MIT; public domain |
| Python code | the standard library of Python 3.11 without tests and generated tables | PSF licence |

Hard-wrapped paragraphs were re-flowed, front matter, illustration marks and rule lines removed, quotation marks made
plain. About 9 % of the tokens are chat documents made from the same texts by templates: a question, one or two
sentences of thinking, and a real passage, poem or function as the answer. {heldout}

"""
_GUTENBERG = "11, 12, 16, 55, 113, 236, 503, 540, 640, 641, 1597, 1661, 2435, 2591, 3282, 5615, 7277, 7439"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of the log; a resumed run replaces the steps that it repeats."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for _, record in sorted({record["step"]: record for record in records}.items())]


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def card(
    log: list[dict[str, Any]], facts: dict[str, Any], report: dict[str, Any], rows: int, note: str
) -> str:
    """The text of the card."""
    config, steps = MODEL_CONFIG, log[-1]["step"]
    tokens = steps * rows * CONTEXT
    held = sum(facts[name]["heldout_documents"] for name in DOMAINS)
    text = _HEAD.format(
        total=22.47,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        q=config["q_lora_rank"],
        kv=config["kv_lora_rank"],
        nope=config["qk_nope_head_dim"],
        rope=config["qk_rope_head_dim"],
        v=config["v_head_dim"],
        experts=config["n_routed_experts"],
        width=config["moe_intermediate_size"],
        groups=config["n_group"],
        topk=config["num_experts_per_tok"],
        top_groups=config["topk_group"],
        factor=config["routed_scaling_factor"],
        original=config["rope_scaling"]["original_max_position_embeddings"],
        positions=config["max_position_embeddings"],
        context=CONTEXT,
        vocab=config["vocab_size"],
        gutenberg=_GUTENBERG,
        heldout=f"{held} whole documents (1.5 to 2 % of each domain, chosen by a hash) were held out.",
    )
    lines = [
        "| Domain | Documents | Characters | Chat documents | Tokens | Held-out tokens | Characters per token |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in DOMAINS:
        fact = facts[name]
        lines.append(
            f"| {name} | {fact['documents']:,} | {fact['characters']:,} | {fact['chat_documents']:,} | "
            f"{fact['tokens']:,} | {fact['heldout_tokens']:,} | {fact['characters_per_token']} |"
        )
    epoch = sum(fact["tokens"] for fact in facts.values())
    lines += [
        "",
        "## Training",
        "",
        f"{steps:,} steps of {rows} rows of {CONTEXT} tokens: {tokens / 1e6:.1f} million tokens "
        f"({tokens / epoch:.1f} passes over the data). Muon (momentum 0.95, update RMS 0.2, weight decay 0.1) for "
        "the hidden matrices, AdamW (0.9, 0.95) for embedding, head, norms and router (router at 0.3 of the rate). "
        "Rate 3e-3: 100 steps of warm-up, constant, then linear to zero over the last 40 %. Gradient norm "
        "clipped at 1, seed 1234, BF16 products on FP32 weights. MTP loss weight 0.3, 0.1 while the rate falls. "
        "Loss-free balancing only: the routing bias moves by 1e-3 per step (up to 2e-2 in the first 500 steps) "
        f"against the load. {note}",
        "",
        "| Step | Main loss | MTP loss | Learning rate | Busiest expert / mean, per MoE layer (MTP last) |",
        "|---|---|---|---|---|",
    ]
    marks = sorted({50, 100, 200, *range(0, steps, max(100, steps // 1000 * 100))} - {0} | {steps})
    for mark in marks:
        window = [record for record in log if mark - 20 < record["step"] <= mark]
        if window:
            skew = " ".join(
                f"{mean([r['skew'][i] for r in window]):.2f}" for i in range(len(window[0]["skew"]))
            )
            lines.append(
                f"| {mark:,} | {mean([r['loss'] for r in window]):.3f} | {mean([r['mtp'] for r in window]):.3f} | "
                f"{window[-1]['lr']:.2g} | {skew} |"
            )
    lines += ["", "Losses are means over the 20 steps before, in nats per token, all domains together.", ""]
    lines += ["## Held-out measurements", ""]
    lines += ["| | " + " | ".join(DOMAINS) + " |", "|---|" + "---|" * len(DOMAINS)]

    def row(label: str, form: str, key: str) -> None:
        lines.append(f"| {label} | " + " | ".join(form.format(report[name][key]) for name in DOMAINS) + " |")

    row("Tokens measured", "{:,}", "tokens")
    row("Loss, FP8 weights", "{:.4f}", "loss")
    row("Loss, BF16 weights", "{:.4f}", "bf16_loss")
    row("Perplexity per token, FP8", "{:.2f}", "perplexity")
    row("Perplexity per token, BF16", "{:.2f}", "bf16_perplexity")
    row("Perplexity per character, FP8", "{:.3f}", "perplexity_per_character")
    row("Bits per character, FP8", "{:.3f}", "bits_per_character")
    row("First choice right", "{:.1%}", "top1")
    row("MTP loss (token after next)", "{:.4f}", "mtp_loss")
    row("MTP acceptance (its first choice is the main model's)", "{:.1%}", "mtp_acceptance")
    if all("oracle_loss_4_rows" in report[name] for name in DOMAINS):
        row("transformers in FP32, 4 rows", "{:.4f}", "oracle_loss_4_rows")
        row("Training code in BF16, the same rows", "{:.4f}", "own_loss_4_rows")
    lines += ["", "Expert load per domain, FP8 weights (MoE layers 1 to 4 of the main model, then MTP):", ""]
    lines += [
        "| Domain | Busiest expert / mean | Share of the 8 busiest of 64 (even: 12.5 %) | Unused experts |"
    ]
    lines += ["|---|---|---|---|"]
    for name in DOMAINS:
        result = report[name]
        share = " ".join(f"{100 * value:.0f} %" for value in result["share_of_top_8_experts"])
        skew = " ".join(f"{value:.2f}" for value in result["skew"])
        lines.append(f"| {name} | {skew} | {share} | {' '.join(map(str, result['unused_experts']))} |")
    lines += ["", "## Samples", "", "Temperature 0.7, top-p 0.95, seed 7, first try, cut at 160 tokens.", ""]
    for name, (prompt, continuation) in report.get("samples", {}).items():
        lines += [f"**{name}**", "", "````text", f"{prompt}[continues:]{continuation}".rstrip(), "````", ""]
    lines += [
        "## Limits",
        "",
        "- It imitates form: names, rhythm and syntax are plausible, content is not. It knows no facts, its code does "
        "not work, and it has read no other kind of text.",
        "- Its chat follows the templates it was trained on; other requests get a tale, a poem or code at random.",
        f"- Trained on rows of {CONTEXT} tokens; longer contexts rely on YaRN and were not trained.",
        "- The books are of the nineteenth and early twentieth century and carry the views of their time.",
        "- Small matrices make small experts: figures of speed from this model say nothing about large ones.",
        "",
    ]
    return text + "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--demo", type=Path, default=Path("expertmesh/demo"))
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    facts = json.loads((args.data / "data.json").read_text())
    report = json.loads(args.report.read_text(encoding="utf-8"))
    text = card(read_log(args.state / "log.jsonl"), facts, report, args.rows, args.note)
    (args.demo / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
