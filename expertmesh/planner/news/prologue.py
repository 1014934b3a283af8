"""What comes before attention, as one kernel after the other and as one: time by starts, bytes and arithmetic."""

from dataclasses import dataclass

from expertmesh.planner.cards import Arithmetic
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.formats import weight_bytes
from expertmesh.planner.news.claims import Claim, Finding
from expertmesh.planner.news.setting import MANY, STEP_TOKENS, News, change
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.work import Rates


@dataclass(frozen=True)
class Operator:
    """One kernel. weights: bytes; reads, writes: bytes of rows; flops: of a product, 0 where there is none."""

    name: str
    weights: float
    reads: float
    writes: float
    flops: float = 0.0
    arithmetic: Arithmetic = "bf16"


def operators(deployment: Deployment, rows: float) -> tuple[Operator, ...]:
    """From hidden states to queries, and latents in the cache, of one layer on one rank with so many rows and its
    share of the heads (DeepSeek-V2, section 2.1; absorbed). Rows are quantised before products of quantised weights."""
    d, m = deployment, deployment.model
    kept, how = weight_bytes(d.weights.precision.linear), d.weights.linear
    heads, queries = m.num_attention_heads / d.topology.tp, m.q_lora_rank or m.hidden_size
    nope, rope, latent = m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
    small = 2.0 if how == "bf16" else 1.0  # bytes of a number that products take
    plain = 2.0

    def small_op(name: str, inputs: float, outputs: float, wrote: float = plain) -> Operator:
        return Operator(name, 0.0, rows * inputs * plain, rows * outputs * wrote)

    def product(name: str, inputs: float, outputs: float) -> Operator:
        flops = 2.0 * rows * inputs * outputs
        return Operator(
            name, inputs * outputs * kept, rows * inputs * small, rows * outputs * plain, flops, how
        )

    up = heads * nope * latent
    absorb = Operator(
        "absorb", up * plain, rows * heads * nope * plain, rows * heads * latent * plain, 2 * rows * up
    )
    low = (
        product("q_a", m.hidden_size, queries),
        small_op("norm of q_a", queries, queries),
        small_op("quantise q_a", queries, queries, small),
    )
    every = (
        small_op("norm", m.hidden_size, m.hidden_size),
        small_op("quantise rows", m.hidden_size, m.hidden_size, small),
        *(low if m.q_lora_rank else ()),
        product("q_b", queries, heads * (nope + rope)),
        absorb,
        small_op("rotate queries", heads * rope, heads * rope),
        product("kv_a", m.hidden_size, latent + rope),
        small_op("norm of latents", latent, latent),
        small_op("rotate keys", rope, rope),
        small_op("latents to their pages", latent, latent),
        small_op("keys to their pages", rope, rope),
    )
    return tuple(o for o in every if how != "bf16" or not o.name.startswith("quantise"))


def apart_and_fused(deployment: Deployment, rows: float, p: Parameters | None = None) -> tuple[float, float]:
    """Seconds of these operators one after the other, and of one kernel that reads hidden states and all weights once
    and writes queries and cache."""
    rates, every = Rates(deployment.card, p or deployment.card.reached), operators(deployment, rows)
    apart = sum(_seconds(rates, o, rows) for o in every)
    m = deployment.model
    queries = m.num_attention_heads / deployment.topology.tp * m.latent_dim
    rows_once = rows * 2.0 * (m.hidden_size + queries + m.latent_dim)
    busy = max(
        sum(_arithmetic(rates, o, rows) for o in every),
        rates.compute("", 0.0, 0.0, "bf16", sum(o.weights for o in every) + rows_once).seconds,
    )
    return apart, busy + rates.card.launch_us * 1e-6


def _arithmetic(rates: Rates, o: Operator, rows: float) -> float:
    padded = o.flops * (1 + rates.p.tile_rows / 2 / rows)
    return rates.compute(o.name, o.flops, padded, o.arithmetic, 0.0).seconds


def _seconds(rates: Rates, o: Operator, rows: float) -> float:
    padded = o.flops * (1 + rates.p.tile_rows / 2 / rows)
    read = o.weights + o.reads + o.writes
    return rates.compute(o.name, o.flops, padded, o.arithmetic, read, 1.0).seconds


def prologue(news: News) -> Claim:
    d = news.layout(MANY)
    times = {rows: apart_and_fused(d, rows, news.p) for rows in (STEP_TOKENS, 8, 1024)}
    figures: dict[str, float] = {}
    for rows, (apart, fused) in times.items():
        figures |= {
            f"us a layer, {rows} rows, one by one": apart * 1e6,
            f"us a layer, {rows} rows, fused": fused * 1e6,
        }
    return Claim(
        "time of what comes before attention", "change", -0.5,
        tuple(Finding(change(*times[rows]), f"a TP group has {rows} rows") for rows in times), figures,
        "norm, projections, rotation and cache as one kernel that computes while it reads, against one kernel each, of "
        f"which every one takes {news.card.launch_us:g} us to start",
    )  # fmt: skip
