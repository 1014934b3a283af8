"""The ops that `expertmesh bench kernels` measures, with the sizes of real models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from expertmesh.bench.kernels import BF16, PRECISIONS, Case, Way, copies_of, keep, random_numbers
from expertmesh.kernels import AttentionRows, Kernels, Queries, Rotary, Routing, eager, reference
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.types import Prefill

Size = TypeVar("Size")
PAGE = 64
EPS = 1e-6


@dataclass(frozen=True)
class AttentionSizes:
    """What one rank has of a layer's attention."""

    name: str
    hidden: int
    heads: int
    q_lora: int
    latent: int
    rope: int
    nope: int
    value: int

    @property
    def cached(self) -> int:
        return self.latent + self.rope

    @property
    def low(self) -> int:
        return self.q_lora + self.cached


@dataclass(frozen=True)
class Attention(AttentionSizes):
    """layers: how many there are to cycle over; None: as many as no cache holds."""

    layers: int | None = None


@dataclass(frozen=True)
class Mixture:
    name: str
    hidden: int
    inner: int
    experts: int
    choices: int


V3_RANK = Attention("V3, a rank of 8", 7168, 16, 1536, 512, 64, 128, 128)
MIDR = Attention("midr", 1024, 16, 512, 512, 64, 128, 128, layers=12)
DEMO = Attention("the demo model", 192, 8, 96, 64, 16, 32, 32, layers=5)
V2_LITE = Mixture("V2-Lite", 2048, 1408, 64, 6)
VOCABULARY, EXPERTS = 32000, 256  # of midr, and of V3
V3_ROUTING = Routing(8, 8, 4, "noaux_tc", "sigmoid", True, 2.5)
# Our time over the baseline's that every row has to be below: by tokens, and by precision.
FEW, MANY = {"bf16": 0.65, "w8a8": 0.45}, {"bf16": 0.75, "w8a8": 0.50}
PROLOGUE_BARS = {1: FEW, 4: FEW, 16: FEW, 64: MANY}
SMALL_BARS = {tokens: {"bf16": 0.35} for tokens in (1, 2, 4)}
EXPERTS_BARS = {tokens: {"bf16": bar} for tokens, bar in ((1, 0.6), (16, 0.75), (64, 0.8), (256, 0.8))}


@dataclass(frozen=True)
class Setting:
    """How much is measured. cold: bytes that no cache holds."""

    kernels: Kernels
    precisions: Sequence[str]
    cold: int
    quick: bool = False
    compiled: bool = False

    def some(self, sizes: Sequence[Size]) -> Sequence[Size]:
        return sizes[:: max(1, len(sizes) // 2)][:2] if self.quick else sizes


def copies(weight: Tensor, count: int) -> list[Tensor]:
    return [weight] + [weight.clone() for _ in range(count - 1)]


def decoding(slots: Tensor, pages: Tensor, lengths: Tensor) -> AttentionRows:
    return AttentionRows(slots, slots.shape[0], pages, lengths, ())


# ---- the prologue


def prologues(setting: Setting) -> Iterator[Case]:
    yield from _prologues(setting, V3_RANK, (1, 4, 16, 64, 256), PROLOGUE_BARS)
    for sizes in (MIDR, DEMO):
        yield from _prologues(setting, sizes, (1, 2, 4), SMALL_BARS)


def _prologues(
    setting: Setting, sizes: Attention, tokens: Sequence[int], bars: dict[int, dict[str, float]]
) -> Iterator[Case]:
    kernels, s = setting.kernels, sizes
    a = random_numbers(s.low, s.hidden, scale=s.hidden**-0.5)
    q_b = random_numbers(s.heads * (s.nope + s.rope), s.q_lora, scale=s.q_lora**-0.5, seed=2)
    kv_b = random_numbers(s.heads * (s.nope + s.value), s.latent, scale=s.latent**-0.5, seed=3)
    key_up = kv_b.view(s.heads, -1, s.latent)[:, : s.nope].contiguous()
    weights, absorbed = a.numel() + q_b.numel(), key_up.numel()
    count = s.layers or copies_of(2 * (weights + absorbed), setting.cold)
    plain = [(x, y, kv_b, z) for x, y, z in zip(*(copies(w, count) for w in (a, q_b, key_up)), strict=True)]
    kept = {}
    for name in setting.precisions:
        precision = PRECISIONS[name]
        size = weights * precision.weight_bytes + 2 * absorbed
        kept[name] = [
            (keep(kernels, precision, a), keep(kernels, precision, q_b, s.heads), latent_up(kernels, s, kv_b))
            for _ in range(s.layers or copies_of(size, setting.cold))
        ]
    for rows in setting.some(tokens):
        yield _prologue(setting, s, rows, plain, kept, (weights, absorbed), bars.get(rows, {}))


def _prologue(
    setting: Setting, s: Attention, rows: int, plain: list[Any], kept: dict[str, list[Any]], numbers: tuple[int, int],
    bars: dict[str, float],
) -> Case:  # fmt: skip
    """Everything before attention, the absorption of W_UK included on both sides."""
    x = random_numbers(rows, s.hidden, seed=4)
    norm, q_norm, kv_norm = (1 + random_numbers(width, scale=0.1) for width in (s.hidden, s.q_lora, s.latent))
    angles = torch.outer(torch.arange(4096.0), torch.linspace(0, 1, s.rope // 2))
    rotary = Rotary(torch.arange(rows) * 7 + 3, angles.cos(), angles.sin(), True)
    cache = torch.zeros(rows + 3, PAGE, s.cached, dtype=BF16)
    where = decoding(torch.arange(rows) * PAGE + 1, torch.arange(rows)[:, None], torch.full((rows,), 2))

    def by(module: Any, a: Any, q_b: Any, kv_b: Any) -> Queries:
        found: Queries = module.mla_prologue(
            x, norm, EPS, a, None, q_norm, kv_norm, q_b, kv_b, rotary, where, cache, s.heads
        )
        return found

    def ours(mine: list[Any]) -> Way:
        return Way(lambda i: (by(setting.kernels, *mine[i]).absorbed, cache), len(mine))

    def absorbing(module: Any, a: Tensor, q_b: Tensor, kv_b: Tensor, key_up: Tensor) -> tuple[Tensor, Tensor]:
        q = by(module, a, q_b, kv_b).plain
        return eager.absorb(q[..., : s.nope], q[..., s.nope :], key_up), cache

    def theirs(module: Any, run: Callable[..., Any] = absorbing) -> Way:
        return Way(lambda i: run(module, *plain[i]), len(plain))

    beside = {"eager": theirs(eager)}
    if setting.compiled:
        beside["compiled"] = theirs(reference, torch.compile(absorbing, dynamic=False))
    weights, absorbed = numbers
    return Case(
        "prologue", s.name, rows, {name: ours(mine) for name, mine in kept.items()},
        {"reference": theirs(reference)}, lambda: absorbing(reference, *plain[0]), weights,
        2.0 * rows * (weights + absorbed), beside, 2 * absorbed, bars=bars, before=cache.zero_,
    )  # fmt: skip


def latent_up(kernels: Kernels, s: Attention, kv_b: Tensor) -> Any:
    made = kernels.latent_up(s.heads, s.nope, s.value, s.latent, Kept(BF16, torch.device("cpu")))
    made.copy_(kv_b)
    return made


# ---- attention


def attentions(setting: Setting) -> Iterator[Case]:
    for batch, length in setting.some(((1, 512), (16, 512), (16, 4096), (1, 4096))):
        yield _decode(setting, V3_RANK, batch, length)
    yield _prefill(setting, V3_RANK, 512)


def _latents(
    setting: Setting, s: Attention, batch: int, length: int
) -> tuple[Tensor, list[Tensor], Tensor, list[Any]]:
    """A paged cache, the pages [B, M] of a batch in each of its copies, and the up-projection as it is and as we keep
    it."""
    each = -(-length // PAGE)
    count = copies_of(2 * batch * length * s.cached, setting.cold)
    order = torch.randperm(count * batch * each, generator=torch.Generator().manual_seed(1))
    cache = random_numbers(len(order), PAGE, s.cached, seed=5)
    kv_b = random_numbers(s.heads * (s.nope + s.value), s.latent, scale=s.latent**-0.5, seed=3)
    kept = [latent_up(setting.kernels, s, kv_b) for _ in range(min(count, 32))]
    return cache, list(order.view(count, batch, each)), kv_b, kept


def _decode(setting: Setting, s: Attention, batch: int, length: int) -> Case:
    """Absorbed queries over the latents: both sides get them so."""
    cache, pages, kv_b, kept = _latents(setting, s, batch, length)
    plain = random_numbers(batch, s.heads, s.nope + s.rope, seed=6)
    up = kv_b.view(s.heads, -1, s.latent)
    q = eager.absorb(plain[..., : s.nope], plain[..., s.nope :], up[:, : s.nope]).contiguous()
    w_uv = copies(up[:, s.nope :].contiguous(), len(kept))
    lengths, scale = torch.full((batch,), length), (s.nope + s.rope) ** -0.5

    def ours(i: int) -> tuple[Tensor]:
        rows = decoding(lengths, pages[i], lengths)
        mine = kept[i % len(kept)]
        return (setting.kernels.mla_attention(Queries(plain[:0], q), rows, cache, mine, scale, s.value),)

    def theirs(i: int) -> tuple[Tensor]:
        known = cache[pages[i]].flatten(1, 2)
        later = torch.arange(known.shape[1]) >= lengths[:, None]
        return (eager.attend_latents(q, known, later[:, None], w_uv[i % len(w_uv)], scale),)

    def expected() -> tuple[Tensor]:
        rows = decoding(lengths, pages[0], lengths)
        return (reference.mla_attention(Queries(plain, q[:0]), rows, cache, kv_b, scale, s.value),)

    pairs, weights = batch * length * s.heads, s.heads * s.value * s.latent
    return Case(
        f"attention at {length}", s.name, batch, {"bf16": Way(ours, len(pages))},
        {"eager": Way(theirs, len(pages))}, expected, weights,
        2.0 * pairs * (s.cached + s.latent) + 2.0 * batch * weights, other_bytes=2.0 * batch * length * s.cached,
    )  # fmt: skip


def _prefill(setting: Setting, s: Attention, length: int) -> Case:
    cache, pages, kv_b, kept = _latents(setting, s, 1, length)
    plain = random_numbers(length, s.heads, s.nope + s.rope, seed=6)
    nothing, scale = torch.zeros(0, dtype=torch.int64), (s.nope + s.rope) ** -0.5
    w_kv = copies(kv_b, len(kept))

    def way(module: Any, weights: list[Any]) -> Callable[[int], tuple[Tensor]]:
        def call(i: int) -> tuple[Tensor]:
            known = Prefill(0, length, length, pages[i][0])
            rows = AttentionRows(nothing, 0, nothing.view(0, 1), nothing, (known,))
            queries = Queries(plain, plain.new_empty(0, s.heads, s.cached))
            return (module.mla_attention(queries, rows, cache, weights[i % len(weights)], scale, s.value),)

        return call

    pairs = s.heads * length * (length + 1) // 2
    return Case(
        "prefill", s.name, length, {"bf16": Way(way(setting.kernels, kept), len(pages))},
        {"eager": Way(way(eager, w_kv), len(pages))}, lambda: way(reference, w_kv)(0), kv_b.numel(),
        2.0 * pairs * (s.nope + s.rope + s.value) + 2.0 * length * kv_b.numel(), other_bytes=2.0 * length * s.cached,
    )  # fmt: skip


# ---- experts


def experts(setting: Setting) -> Iterator[Case]:
    m = V2_LITE
    gate_up = random_numbers(m.experts, 2 * m.inner, m.hidden, scale=m.hidden**-0.5)
    down = random_numbers(m.experts, m.hidden, m.inner, scale=m.inner**-0.5, seed=2)
    kept = {
        name: (
            keep(setting.kernels, PRECISIONS[name], gate_up, 2),
            keep(setting.kernels, PRECISIONS[name], down),
        )
        for name in setting.precisions
    }
    for rows in setting.some((1, 16, 64, 256)):
        yield _experts(setting, m, rows, (gate_up, down), kept)


def _experts(
    setting: Setting, m: Mixture, rows: int, plain: tuple[Tensor, Tensor], kept: dict[str, tuple[Any, Any]]
) -> Case:
    x, shares = random_numbers(rows, m.hidden, seed=3), torch.full((rows, m.choices), 1 / m.choices)
    turns = _choices(m, rows)

    def way(op: Callable[..., Tensor], weights: Sequence[Any]) -> Way:
        return Way(lambda i: (op(x, turns[i], shares, *weights),), len(turns))

    theirs = {"loop": way(loop, plain), "eager": way(eager.experts, plain)}
    if hasattr(F, "grouped_mm"):
        theirs["grouped_mm"] = way(grouped, plain)
    size = 3 * m.hidden * m.inner
    hit = sum(len(turn.unique()) for turn in turns) / len(turns)
    return Case(
        "experts", m.name, rows, {name: way(setting.kernels.experts, mine) for name, mine in kept.items()}, theirs,
        lambda: way(reference.experts, plain).call(0), hit * size, 2.0 * rows * m.choices * size,
        bars=EXPERTS_BARS.get(rows, {}),
    )  # fmt: skip


def _choices(m: Mixture, rows: int) -> list[Tensor]:
    """Experts of the rows in several turns: of a single row no turn takes any of another's."""
    generator = torch.Generator().manual_seed(1)
    count = m.experts // m.choices
    if rows == 1:
        order = torch.randperm(m.experts, generator=generator)[: count * m.choices]
        return list(order.view(count, 1, m.choices))
    return [torch.rand(rows, m.experts, generator=generator).topk(m.choices).indices for _ in range(count)]


def loop(x: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert that was hit after the other."""
    out = torch.zeros_like(x)
    for slot in slots.unique().tolist():
        row, choice = (slots == slot).nonzero(as_tuple=True)
        gate, up = F.linear(x[row], gate_up[slot]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[slot])
        out.index_add_(0, row, y * weights[row, choice, None].to(y.dtype))
    return out


def grouped(x: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts in two calls, rows sorted by expert."""
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    row = order // slots.shape[1]
    ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[row], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, row, y * weights.flatten()[order, None].to(y.dtype))


# ---- what is left


def heads(setting: Setting) -> Iterator[Case]:
    weight = random_numbers(VOCABULARY, MIDR.hidden, scale=MIDR.hidden**-0.5)
    plain = copies(weight, copies_of(2 * weight.numel(), setting.cold))
    kept = [keep(setting.kernels, PRECISIONS["bf16"], weight) for _ in plain]
    for rows in (1, 16):
        yield _head(setting, rows, plain, kept)


def _head(setting: Setting, rows: int, plain: list[Tensor], kept: list[Any]) -> Case:
    x, size = random_numbers(rows, MIDR.hidden, seed=2), plain[0].numel()

    def way(module: Any, weights: list[Any]) -> Way:
        return Way(lambda i: (module.logits(x, weights[i]),), len(weights))

    return Case(
        "head", MIDR.name, rows, {"bf16": way(setting.kernels, kept)},
        {"reference": way(reference, plain), "eager": way(eager, plain)}, lambda: way(reference, plain).call(0), size,
        2.0 * rows * size,
    )  # fmt: skip


def routers(setting: Setting) -> Iterator[Case]:
    weight = random_numbers(EXPERTS, V3_RANK.hidden, scale=V3_RANK.hidden**-0.5).float()
    plain = copies(weight, copies_of(4 * weight.numel(), setting.cold))
    for rows in (1, 16):
        yield _router(setting, rows, plain)


def _router(setting: Setting, rows: int, weights: list[Tensor]) -> Case:
    """Its products are float32, whatever the precision."""
    x, bias = (
        random_numbers(rows, V3_RANK.hidden, seed=2),
        random_numbers(EXPERTS, scale=0.01, seed=3).float(),
    )

    def way(module: Any) -> Way:
        return Way(lambda i: module.router(x, weights[i], bias, V3_ROUTING), len(weights))

    size = weights[0].numel()
    return Case(
        "router", "V3", rows, {"bf16": way(setting.kernels)}, {"reference": way(reference)},
        lambda: _shares(way(reference).call(0)), 0, 2.0 * rows * size, other_bytes=4.0 * size, peak="float32",
        seen=_shares,
    )  # fmt: skip


def _shares(found: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    """Of equal experts either may be chosen."""
    return (found[1].sort(dim=-1).values,)


OPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "prologue": prologues,
    "attention": attentions,
    "experts": experts,
    "head": heads,
    "router": routers,
}
