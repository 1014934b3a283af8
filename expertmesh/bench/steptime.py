"""How long a step of decoding would take on cards, by the counts of what each of them reads, computes and sends, and by
the planner's rates: what is counted on the engine and what is predicted of it differ by their counts alone."""

from dataclasses import dataclass

from expertmesh.config import ModelConfig
from expertmesh.planner.cards import Arithmetic, Card
from expertmesh.planner.work import Rates


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
    """Seconds of each part and in all. computing: products, or reading where that takes longer; travelling: rows over
    the slower links; starting: what exchanges take without rows. Nothing overlaps."""
    rates = Rates(card, card.reached)
    read = work.weights + work.cache
    parts = {
        "computing": rates.compute("products", work.flops, work.flops, arithmetic, read).seconds,
        "travelling": rates.travel("rows", 0.0, work.inside, work.across).seconds,
        "starting": work.exchanges * (card.dispatch_us + card.combine_us) * 1e-6,
    }
    without = parts["computing"] + parts["travelling"]
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
