"""How long a step of decoding would take on cards, by the counts of what each of them reads, computes and sends.

A plain roofline, for clusters that are not here: what is counted on the engine and what is predicted of it go through
the same formula, so that their difference is that of the counts.
"""

from dataclasses import dataclass

from expertmesh.config import ModelConfig
from expertmesh.planner.cards import Arithmetic, Card


@dataclass(frozen=True)
class Work:
    """Of one rank in one step. weights, cache: bytes that it reads; flops; across, inside: bytes that it sends to other
    nodes, and to other ranks of its node; exchanges: how many times rows go to experts and back."""

    weights: float
    cache: float
    flops: float
    across: float
    inside: float
    exchanges: int


def step_seconds(work: Work, card: Card, arithmetic: Arithmetic = "bf16") -> dict[str, float]:
    """Seconds of each part and in all.

    total = max(reading, computing) + across + inside + starting, where reading = (weights + cache) / bandwidth of the
    memory, computing = flops / peak, across and inside = bytes / rate of the links, and starting = what an exchange
    takes that has no rows, for each layer with experts. Nothing overlaps but reading and computing.
    """
    parts = {
        "reading": (work.weights + work.cache) / (card.memory_gbs * 1e9),
        "computing": work.flops / (card.tflops(arithmetic) * 1e12),
        "across": work.across / (card.across_gbs * 1e9),
        "inside": work.inside / (card.node_gbs * 1e9),
        "starting": work.exchanges * (card.dispatch_us + card.combine_us) * 1e-6,
    }
    travelling = parts["across"] + parts["inside"]
    without = max(parts["reading"], parts["computing"]) + travelling
    return parts | {"total": without + parts["starting"], "total_without_starting": without}


@dataclass(frozen=True)
class Step:
    """What is known of a step of decoding. requests: of each TP group; context: tokens of each; rows: that the fullest
    rank's experts compute, over all layers; touched: the share of a rank's experts that have any; across, inside: bytes
    that a rank sends, on average."""

    requests: int
    context: int
    rows: float
    touched: float
    across: float
    inside: float


def work_of(
    c: ModelConfig, kinds: dict[str, int], cache_per_token: int, itemsize: float, tp: int, step: Step
) -> Work:
    """kinds: bytes of a rank's weights (`weights.static_bytes`), of which every one is read but those of the table of
    the embedding and of experts without rows; itemsize: bytes of a weight's number.

    Products: 2 flops for each number and row. Rows of the whole group pass what it splits, a rank's own rows the rest.
    Attention is in the space of the latents (DeepSeek-V2, section 2.1.2): scores and sums of every head.
    """
    own = step.requests / tp
    table = 0 if c.tie_word_embeddings else kinds["embedding"] / 2
    routed = kinds.get("routed", 0)
    read = sum(kinds.values()) - table - routed * (1 - step.touched)
    of_group = (kinds["attention"] + kinds.get("dense", 0) + kinds["embedding"] - table) / itemsize
    of_rank = (kinds.get("shared", 0) + kinds.get("router", 0)) / itemsize
    of_row = 3 * c.moe_intermediate_size * c.hidden_size
    heads = c.num_attention_heads / tp
    attending = step.requests * step.context * c.num_hidden_layers * heads * (c.latent_dim + c.kv_lora_rank)
    flops = 2 * (of_group * step.requests + of_rank * own + of_row * step.rows + attending)
    cache = step.requests * step.context * cache_per_token
    return Work(read, cache, flops, step.across, step.inside, len(c.moe_layers))
