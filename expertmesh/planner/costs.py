"""Time of one step of decoding or prefill, by part: rooflines with efficiencies that depend on shapes, starts of
kernels, the exchange in two tiers, imbalance, and micro-batches that overlap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expertmesh.planner.cards import Arithmetic
from expertmesh.planner.deployment import Decode, Deployment, Load, Prefill
from expertmesh.planner.exchange import collective, exchange
from expertmesh.planner.formats import CACHES, weight_bytes
from expertmesh.planner.imbalance import busiest, imbalance, used
from expertmesh.planner.memory import static_memory
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.schedule import two_batches
from expertmesh.planner.work import Bound, Part, Rates, joined

# Tokens that a step gives for each further draft, over those for the one before it: between 0.7 and 0.9 published.
ACCEPTANCE = 0.78


@dataclass(frozen=True)
class Step:
    """parts: of all layers, one after the other; seconds: of the step, where some of them may overlap; floor: what the
    resources need at their peak; tokens: that one TP group puts out, or takes in; rows: of one rank."""

    parts: tuple[Part, ...]
    seconds: float
    floor: float
    tokens: float
    rows: float

    @property
    def bound(self) -> Bound:
        """The resource that most of the time goes to."""
        totals: dict[Bound, float] = {}
        for part in self.parts:
            totals[part.bound] = totals.get(part.bound, 0.0) + part.seconds
        return max(totals, key=lambda bound: totals[bound])

    @property
    def by_part(self) -> dict[str, float]:
        """Seconds of each part."""
        return {part.name: part.seconds for part in self.parts}


def accepted_tokens(deployment: Deployment) -> float:
    """Tokens that a step of decoding gives for each request."""
    if deployment.accepted is not None:
        return deployment.accepted
    return sum(ACCEPTANCE**i for i in range(deployment.drafts + 1))


@dataclass(frozen=True)
class _Rows:
    """group: rows of a TP group; mine: of a rank; requests: of a group whose last row goes through the head."""

    group: float
    mine: float
    requests: float


def decode_step(deployment: Deployment, load: Decode, p: Parameters | None = None) -> Step:
    """One step of decoding, drafts and their check included."""
    rates = Rates(deployment.card, p or deployment.card.reached, cached=_cached(deployment))
    rows = load.batch * (1 + deployment.drafts)
    parts, seconds = _main(rates, deployment, load)
    extra = [_between(rates, load.batch, deployment)]
    if deployment.drafts:
        extra.append(_drafts(rates, deployment, load))
    tokens = load.batch * accepted_tokens(deployment)
    return _step([*parts, *extra], seconds + sum(part.seconds for part in extra), tokens, rows, deployment)


def prefill_step(deployment: Deployment, load: Prefill, p: Parameters | None = None) -> Step:
    """One step of prefill: so many tokens of prompts on each rank."""
    rates = Rates(deployment.card, p or deployment.card.reached, True, _cached(deployment))
    parts, seconds = _main(rates, deployment, load)
    tokens = load.tokens * deployment.topology.tp
    extra = _between(rates, tokens / (load.length - load.cached), deployment)
    return _step([*parts, extra], seconds + extra.seconds, tokens, tokens, deployment)


def _cached(d: Deployment) -> float:
    """Share of a rank's weights that its last cache holds."""
    size = d.card.cache_mb * 1e6 if d.card.cache_gbs else 0.0
    return min(1.0, size / sum(static_memory(d).values())) if size else 0.0


def _step(parts: list[Part], seconds: float, tokens: float, rows: float, d: Deployment) -> Step:
    here = sum(part.floor for part in parts if not part.travels)
    there = sum(part.floor for part in parts if part.travels)
    floor = max(here, there) if d.overlap else here + there
    return Step(tuple(parts), seconds, min(floor, seconds), tokens, rows / d.topology.tp)


def _between(rates: Rates, requests: float, d: Deployment) -> Part:
    ranks = rates.p.ranks_us if d.ranks > 1 else 0.0
    seconds = (rates.p.step_us + ranks + rates.p.request_us * requests) * 1e-6
    return Part("between steps", seconds, 0.0, "latency")


def _main(rates: Rates, d: Deployment, load: Load) -> tuple[list[Part], float]:
    """Parts of the main model, and the seconds they take."""
    model = d.model
    sparse, head = len(model.moe_layers), _head(rates, d, _rows(d, load))
    dense = model.num_hidden_layers - sparse
    plain = [part.times(dense) for part in _dense_layer(rates, d, load)] if dense else []
    if not d.overlap or not sparse:
        whole = [part.times(sparse) for part in _moe_layer(rates, d, load)] if sparse else []
        parts = [*_summed([*whole, *plain]), head]
        return parts, sum(part.seconds for part in parts)
    half = _moe_layer(rates, d, _half(load))
    if isinstance(load, Prefill):
        half = [_beside(rates, part) for part in half]
    halves = [part.times(2 * sparse) for part in half]
    layer = two_batches([(part.seconds, part.travels) for part in _stages(half)])
    seconds = layer * sparse + sum(part.seconds for part in plain) + head.seconds
    return [*_summed([*halves, *plain]), head], seconds


def _beside(rates: Rates, part: Part) -> Part:
    """What computes while many rows travel: their exchange takes some of the processor. That of few rows does not."""
    return part if part.travels else replace(part, seconds=part.seconds / (1 - rates.p.overlap_cost))


def _half(load: Load) -> Load:
    return (
        replace(load, batch=load.batch / 2)
        if isinstance(load, Decode)
        else replace(load, tokens=load.tokens / 2)
    )


def _stages(parts: Sequence[Part]) -> list[Part]:
    """Neighbours that need the same resource as one."""
    out: list[Part] = []
    for part in parts:
        if out and out[-1].travels == part.travels:
            out[-1] = joined(out[-1].name, [out[-1], part])
        else:
            out.append(part)
    return out


def _summed(parts: Sequence[Part]) -> list[Part]:
    """Those of one name as one."""
    named: dict[str, list[Part]] = {}
    for part in parts:
        named.setdefault(part.name, []).append(part)
    return [same[0] if len(same) == 1 else joined(name, same) for name, same in named.items()]


def _rows(d: Deployment, load: Load) -> _Rows:
    if isinstance(load, Decode):
        group = load.batch * (1 + d.drafts)
        return _Rows(group, group / d.topology.tp, group)
    group = load.tokens * d.topology.tp
    return _Rows(group, load.tokens, group / (load.length - load.cached))


def _moe_layer(rates: Rates, d: Deployment, load: Load) -> list[Part]:
    rows, bulk = _rows(d, load), isinstance(load, Prefill)
    before = [*_attention(rates, d, load, rows), _router(rates, d, rows, bulk)]
    experts, shared = _experts(rates, d, rows), _shared(rates, d, rows)
    if collects(d):
        width = rows.group * d.topology.groups * d.model.hidden_size * 2.0
        way = [collective(rates, name, d.ranks, d.domain, width, bulk) for name in ("dispatch", "combine")]
    else:
        factor = imbalance(d, rows.mine * d.model.num_experts_per_tok, rates.p)
        way = [exchange(rates, d, rows.mine, phase, bulk, factor) for phase in ("dispatch", "combine")]
    return [*before, way[0], *experts, shared, way[1]]


def collects(d: Deployment) -> bool:
    """Whether all rows go to all ranks, by collectives instead of an exchange."""
    return d.expert_split == "tensor" or d.exchange == "collective"


def _dense_layer(rates: Rates, d: Deployment, load: Load) -> list[Part]:
    rows, model, tp = _rows(d, load), d.model, d.topology.tp
    kept, arithmetic = weight_bytes(d.weights.precision.linear), d.weights.linear
    width = model.intermediate_size / tp
    up = rates.matmul("dense", rows.group, model.hidden_size, 2 * width, kept, arithmetic)
    down = rates.matmul(
        "dense", rows.group, width, model.hidden_size, kept, arithmetic, rates.p.layer_kernels / 2
    )
    size = rows.group * model.hidden_size * 2.0
    bulk = isinstance(load, Prefill)
    around = [collective(rates, "tp collectives", tp, d.domain, size, bulk)] * (2 if tp > 1 else 0)
    return [*_attention(rates, d, load, rows), up, down, *around]


def _attention(rates: Rates, d: Deployment, load: Load, rows: _Rows) -> list[Part]:
    model, tp = d.model, d.topology.tp
    projections = joined("projections", list(_projections(rates, d, rows)))
    core = _decode_core(rates, d, load) if isinstance(load, Decode) else _prefill_core(rates, d, load, rows)
    if tp == 1:
        return [projections, core]
    latent = rows.group * ((model.q_lora_rank or model.hidden_size) + model.latent_dim) * 2.0
    size = rows.group * model.hidden_size * 2.0
    bulk = isinstance(load, Prefill)
    around = [collective(rates, "tp collectives", tp, d.domain, b, bulk) for b in (latent, size)]
    return [projections, core, *around]


def _projections(rates: Rates, d: Deployment, rows: _Rows) -> list[Part]:
    model, heads = d.model, d.model.num_attention_heads / d.topology.tp
    kept, arithmetic = weight_bytes(d.weights.precision.linear), d.weights.linear
    hidden, queries = model.hidden_size, heads * model.qk_head_dim

    def linear(rows_: float, inputs: float, outputs: float) -> Part:
        return rates.matmul("projections", rows_, inputs, outputs, kept, arithmetic)

    low = linear(rows.mine, hidden, (model.q_lora_rank or 0) + model.latent_dim)
    query = linear(rows.group, model.q_lora_rank or hidden, queries)
    # Up-projection of latents, by heads: never quantised. In prefill keys and values of all rows, else absorbed.
    up = rates.matmul(
        "projections",
        rows.group,
        model.kv_lora_rank,
        heads * (model.qk_nope_head_dim + model.v_head_dim),
        2.0,
        "bf16",
    )
    out = rates.matmul(
        "projections",
        rows.group,
        heads * model.v_head_dim,
        hidden,
        kept,
        arithmetic,
        rates.p.layer_kernels / 2,
    )
    return [low, query, up, out]


def _decode_core(rates: Rates, d: Deployment, load: Decode) -> Part:
    """Absorbed: all heads over one latent (DeepSeek-V2, section 2.1), as rows of the same tiles."""
    model, heads = d.model, d.model.num_attention_heads / d.topology.tp
    latents, rows = load.batch * load.context, heads * (1 + d.drafts)
    products = 2.0 * (model.latent_dim + model.kv_lora_rank)
    flops = latents * rows * products
    done = latents * (max(rows, rates.p.tile_rows) * products + rows * rates.p.softmax_flops)
    read = load.batch * load.context * model.latent_dim * CACHES[d.cache_precision]
    # A cache in FP8 is multiplied as it is where the hardware can; one in INT8 is made bfloat16.
    arithmetic: Arithmetic = "fp8" if d.cache_precision == "fp8" else "bf16"
    return rates.compute("attention", flops, done, arithmetic, read, attention=True)


def _prefill_core(rates: Rates, d: Deployment, load: Prefill, rows: _Rows) -> Part:
    """Expanded: keys and values for each head; a token sees half of the prompt, and what was cached."""
    model, heads = d.model, d.model.num_attention_heads / d.topology.tp
    seen = load.cached + (load.length - load.cached) / 2
    flops = 2.0 * rows.group * seen * heads * (model.qk_head_dim + model.v_head_dim)
    done = flops + rows.group * seen * heads * rates.p.softmax_flops
    read = rows.group * heads * (2 * model.qk_head_dim + 2 * model.v_head_dim) * 2.0
    return rates.compute("attention", flops, done, "bf16", read, attention=True)


def _router(rates: Rates, d: Deployment, rows: _Rows, bulk: bool) -> Part:
    """Scores in float32, and the small operators of a layer, which only read and write rows."""
    hidden, experts = d.model.hidden_size, d.model.n_routed_experts
    passes = rates.p.passes if bulk else rates.p.decode_passes
    scores = rates.matmul("router, norms", rows.mine, hidden, experts, 4.0, "fp32")
    small = rates.compute("router, norms", 0.0, 0.0, "bf16", passes * rows.mine * hidden * 2.0)
    return joined("router, norms", [scores, small])


def _experts(rates: Rates, d: Deployment, rows: _Rows) -> list[Part]:
    """A grouped product: of experts with any row, each with whole tiles of rows."""
    model, total = d.model, rows.group * d.topology.groups
    kept, arithmetic = weight_bytes(d.weights.precision.experts), d.weights.experts
    slots = (model.n_routed_experts + d.redundant) / d.ranks
    mean = total * model.num_experts_per_tok / d.ranks
    hit = busiest(slots, used(d, mean / slots, rates.p), 1 if d.expert_split == "tensor" else d.ranks)
    mine = mean * imbalance(d, mean, rates.p)
    numbers = 3.0 * model.hidden_size * model.moe_intermediate_size
    read = hit * numbers * kept + mine * (2 * model.hidden_size + 4 * model.moe_intermediate_size) * 2.0
    padded = mine + hit * rates.p.tile_rows / 2
    emptied = rates.p.tile_depth * (model.hidden_size + 2 * model.moe_intermediate_size)
    flops, done = 2.0 * mean * numbers, 2.0 * padded * (numbers + emptied)
    return [rates.compute("experts", flops, done, arithmetic, read, rates.p.layer_kernels / 2)]


def _shared(rates: Rates, d: Deployment, rows: _Rows) -> Part:
    model = d.model
    width, mine = float(model.n_shared_experts * model.moe_intermediate_size), rows.mine
    if collects(d):  # cut over all ranks, which have all rows
        width, mine = width / d.ranks, rows.group * d.topology.groups
    kept, arithmetic = weight_bytes(d.weights.precision.linear), d.weights.linear
    up = rates.matmul("shared", mine, model.hidden_size, 2 * width, kept, arithmetic)
    return joined("shared", [up, rates.matmul("shared", mine, width, model.hidden_size, kept, arithmetic)])


def _head(rates: Rates, d: Deployment, rows: _Rows) -> Part:
    return rates.matmul(
        "head", rows.requests, d.model.hidden_size, d.model.vocab_size / d.topology.tp, 2.0, "bf16", 4
    )


def _drafts(rates: Rates, d: Deployment, load: Decode) -> Part:
    """Each draft is a pass through one more layer and the head (DeepSeek-V3, section 2.2)."""
    alone = replace(d, drafts=0, accepted=None)
    rows = _rows(alone, load)
    layer = _moe_layer(rates, alone, load)
    joins = rates.matmul("drafts", rows.mine, 2 * d.model.hidden_size, d.model.hidden_size, 2.0, "bf16")
    return joined("drafts", [*layer, joins, _head(rates, alone, rows)]).times(d.drafts)
