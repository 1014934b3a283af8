"""The ops of the table with inputs: each is made twice from the same numbers, for kernels that are examined and for the
reference in float32 on the CPU, whose results are then compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertmesh.bench.accelerator.side import PRECISIONS, Side
from expertmesh.bench.accelerator.sizes import Batch, Shape, Sizes
from expertmesh.bench.kernels import random_numbers
from expertmesh.config.precision import PLAIN
from expertmesh.kernels import AttentionRows, Queries, Rotary, Routing
from expertmesh.kernels.table import OPS
from expertmesh.kernels.types import Prefill

EPS = 1e-6
THETA = 1e4  # of rotary positions, as DeepSeek has it
# Those whose weights may be quantised; the others are the same in every precision.
PRODUCTS = ("linear", "swiglu", "mla_down", "mla_up", "mla_prologue", "experts")


@dataclass(frozen=True)
class Case:
    """Which op, with which numbers."""

    op: str
    shape: Shape
    batch: Batch
    precision: str


def cases(sizes: Sizes) -> Iterator[Case]:
    for op in OPS:
        for shape, batches in sizes.models:
            for precision in sizes.precisions[shape.name]:
                if op in PRODUCTS or PRECISIONS[precision].format is PLAIN:
                    once = batches[:1] if op in ("matrix", "latent_up") else batches
                    yield from (Case(op, shape, batch, precision) for batch in once)


@dataclass(frozen=True)
class Made:
    """call: runs the op; seen: of what it returns, what is compared. flops: operations of products. bound: instead of
    the precision's. timed: False where there is nothing to time."""

    call: Callable[[], Any]
    flops: float = 0.0
    seen: Callable[[Any], Sequence[Tensor]] = lambda out: [out]
    bound: float | None = None
    timed: bool = True


def make(case: Case, side: Side) -> Made:
    return MAKERS[case.op](side, case.shape, case.batch)


def tensors(out: Any) -> list[Tensor]:
    """All that an op returned, or that something is made of."""
    if isinstance(out, Tensor):
        return [out]
    parts = out if isinstance(out, tuple | list) else vars(out).values()
    return [part for part in parts if isinstance(part, Tensor)]


# ---- rows and weights


def _matrix(side: Side, s: Shape, batch: Batch) -> Made:
    """What is in it, read by a product: kernels keep weights in an order of their own."""
    made, ones = side.matrix(s.heads * s.value, s.low, seed=1), torch.eye(s.low)
    ones = ones.to(side.compute).to(side.where)
    return Made(lambda: side.kernels.linear(ones, made), timed=False)


def _latent_up(side: Side, s: Shape, batch: Batch) -> Made:
    """What is in it, as attention reads it."""
    return replace(_mla_attention(side, s, batch), timed=False)


def _embed(side: Side, s: Shape, batch: Batch) -> Made:
    table, tokens = side.numbers(s.vocabulary, s.hidden, seed=1), torch.arange(batch.rows) * 7 % s.vocabulary
    side.taken = 0.0  # of the table only rows are read
    tokens = side.there(tokens)
    return Made(lambda: side.kernels.embed(tokens, table), bound=0.0)


def _add(side: Side, s: Shape, batch: Batch) -> Made:
    x, y = (side.numbers(batch.rows, s.hidden, seed=seed) for seed in (1, 2))
    return Made(lambda: side.kernels.add(x, y))


def _count(side: Side, s: Shape, batch: Batch) -> Made:
    chosen = side.there(_chosen(s, batch.rows))
    counts = side.there(torch.arange(s.experts))

    def call() -> Tensor:
        found = counts.clone()
        side.kernels.count(chosen, found)
        return found

    return Made(call, bound=0.0)


def _rms_norm(side: Side, s: Shape, batch: Batch) -> Made:
    x, weight = side.numbers(batch.rows, s.hidden, seed=1, scale=5.0), side.numbers(s.hidden, seed=2)
    return Made(lambda: side.kernels.rms_norm(x, weight, EPS))


# ---- products


def _linear(side: Side, s: Shape, batch: Batch) -> Made:
    columns = s.heads * s.value
    x, weight = side.numbers(batch.rows, columns, seed=1), side.matrix(s.hidden, columns, seed=2)
    bias = side.numbers(s.hidden, seed=3)
    return Made(lambda: side.kernels.linear(x, weight, bias), 2.0 * batch.rows * columns * s.hidden)


def _logits(side: Side, s: Shape, batch: Batch) -> Made:
    x, weight = side.numbers(batch.rows, s.hidden, seed=1), side.matrix(s.vocabulary, s.hidden, seed=2)
    return Made(lambda: side.kernels.logits(x, weight), 2.0 * batch.rows * s.hidden * s.vocabulary)


def _swiglu(side: Side, s: Shape, batch: Batch) -> Made:
    x = side.numbers(batch.rows, s.hidden, seed=1)
    gate_up = side.matrix(2 * s.inner, s.hidden, seed=2, split=2)
    down = side.matrix(s.hidden, s.inner, seed=3)
    return Made(lambda: side.kernels.swiglu(x, gate_up, down), 6.0 * batch.rows * s.hidden * s.inner)


def _router(side: Side, s: Shape, batch: Batch) -> Made:
    """Of equal experts either may be chosen: weights are compared. They are of products in float32 in any precision."""
    x = side.numbers(batch.rows, s.hidden, seed=1)
    weight = side.there(
        random_numbers(s.experts, s.hidden, scale=s.hidden**-0.5, seed=2, dtype=torch.float32)
    )
    bias = side.there(random_numbers(s.experts, scale=0.01, seed=3, dtype=torch.float32))
    routing = Routing(s.choices, s.groups, max(1, s.groups // 2), "noaux_tc", "sigmoid", True, 2.5)
    return Made(
        lambda: side.kernels.router(x, weight, bias, routing), 2.0 * batch.rows * s.hidden * s.experts,
        lambda found: [found[1].sort(dim=-1).values], 1e-3,
    )  # fmt: skip


def _experts(side: Side, s: Shape, batch: Batch) -> Made:
    """Experts with a slot here are the first ones."""
    x, chosen = side.numbers(batch.rows, s.hidden, seed=1), _chosen(s, batch.rows)
    slots = side.there(chosen.where(chosen < s.slots, -1))
    shares = side.there(torch.rand(chosen.shape, generator=torch.Generator().manual_seed(2)))
    gate_up = side.matrix(s.slots, 2 * s.inner, s.hidden, seed=3, split=2)
    down = side.matrix(s.slots, s.hidden, s.inner, seed=4)
    pairs = int((chosen < s.slots).sum())
    return Made(
        lambda: side.kernels.experts(x, slots, shares, gate_up, down), 6.0 * pairs * s.hidden * s.inner
    )


def _chosen(s: Shape, rows: int) -> Tensor:
    """Different experts for each row, [T, K], one of them at least with a slot here: rows of other cards come too."""
    wishes = torch.rand(rows, s.experts, generator=torch.Generator().manual_seed(5))
    wishes[torch.arange(rows), torch.arange(rows) % s.slots] = 2.0
    return wishes.topk(s.choices).indices


# ---- attention


class _Attention:
    """What the ops of a layer's attention take."""

    def __init__(self, side: Side, s: Shape, batch: Batch) -> None:
        self.side, self.s, self.batch = side, s, batch
        self.rows, pages = rows_of(batch, side.page, side.where)
        positions = torch.cat([torch.arange(known - count, known) for known, count in batch.sequences])
        frequencies = THETA ** (-torch.arange(0, s.rope, 2) / s.rope)
        angles = torch.outer(torch.arange(float(max(known for known, _ in batch.sequences))), frequencies)
        positions, cos, sin = (each.to(side.where) for each in (positions, angles.cos(), angles.sin()))
        self.rotary = Rotary(positions, cos, sin, side.interleaved)
        self.cache = side.kernels.cache(pages, side.page, s.latent, s.rope, side.compute, side.where)
        numbers = side.numbers(pages * side.page, s.cached, seed=10)
        kept = tensors(self.cache)
        for tensor, part in zip(kept, numbers.split([t.shape[-1] for t in kept], dim=-1), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
        self.cache_bytes = numbers.nbytes
        self.kv_b = side.latent_up(s, seed=11)

    def down(self) -> tuple[Any, ...]:
        side, s = self.side, self.s
        norms = [1 + side.numbers(width, seed=12, scale=0.1) for width in (s.hidden, s.q_lora, s.latent)]
        a = side.matrix(s.low, s.hidden, seed=14, kind="prologue")
        return side.numbers(self.batch.rows, s.hidden, seed=13), norms[0], EPS, a, None, norms[1], norms[2]

    def up(self) -> tuple[Any, ...]:
        s = self.s
        q_b = self.side.matrix(s.heads * (s.nope + s.rope), s.q_lora, seed=15, split=s.heads, kind="prologue")
        return q_b, self.kv_b, self.rotary, self.rows, self.cache, s.heads

    def low(self) -> tuple[Any, ...]:
        """As the other half makes it."""
        widths = self.s.q_lora, self.s.latent, self.s.rope
        return tuple(self.side.numbers(self.batch.rows, width, seed=16 + width) for width in widths)

    def flops(self, part: str) -> float:
        s, T = self.s, self.batch.rows
        down, q_b = s.low * s.hidden, s.heads * (s.nope + s.rope) * s.q_lora
        absorbed = self.rows.decoding * s.heads * s.nope * s.latent
        return 2.0 * {"down": T * down, "up": T * q_b + absorbed, "both": T * (down + q_b) + absorbed}[part]

    def seen(self, queries: Queries) -> list[Tensor]:
        """All queries in the space of the latents, and the cache they are for."""
        s = self.s
        kept = random_numbers(
            *self.kv_b.shape, scale=s.latent**-0.5, seed=11, dtype=self.side.precision.dtype
        )
        keys = kept.float().view(s.heads, s.nope + s.value, s.latent)[:, : s.nope]
        plain = queries.plain.float().cpu()
        inside = torch.einsum("thn,hnc->thc", plain[..., : s.nope], keys)
        found = torch.cat((inside, plain[..., s.nope :]), -1)
        if queries.absorbed.shape[0]:
            # With their rotary part, or with that in a tensor behind them.
            _, *absorbed = (each.float().cpu() for each in tensors(queries))
            found = torch.cat((torch.cat(absorbed, dim=-1), found))
        return [found, torch.cat([t.flatten(0, -2) for t in tensors(self.cache)], dim=-1)]


def _mla_down(side: Side, s: Shape, batch: Batch) -> Made:
    attention = _Attention(side, s, batch)
    side.taken = 0.0  # neither cache nor other weights are read
    given = attention.down()
    return Made(lambda: side.kernels.mla_down(*given), attention.flops("down"), list)


def _mla_up(side: Side, s: Shape, batch: Batch) -> Made:
    attention = _Attention(side, s, batch)
    given = (*attention.low(), *attention.up())
    side.taken -= attention.cache_bytes  # of which only rows are written
    return Made(lambda: side.kernels.mla_up(*given), attention.flops("up"), attention.seen)


def _mla_prologue(side: Side, s: Shape, batch: Batch) -> Made:
    attention = _Attention(side, s, batch)
    given = (*attention.down(), *attention.up())
    side.taken -= attention.cache_bytes
    return Made(lambda: side.kernels.mla_prologue(*given), attention.flops("both"), attention.seen)


def _mla_attention(side: Side, s: Shape, batch: Batch) -> Made:
    """Of queries as the same kernels make them: absorbed or not is their affair."""
    attention = _Attention(side, s, batch)
    queries = side.kernels.mla_up(*attention.low(), *attention.up())
    side.taken = attention.cache_bytes + attention.kv_b.nbytes + sum(t.nbytes for t in tensors(queries))
    scale = (s.nope + s.rope) ** -0.5
    given = queries, attention.rows, attention.cache, attention.kv_b, scale, s.value
    absorbed, plain = 2 * s.latent + s.rope, s.nope + s.rope + s.value
    flops = 0.0
    for known, count in batch.sequences:
        pairs = count * known - count * (count - 1) // 2
        expanded = count * s.value * s.latent if count == 1 else known * (s.nope + s.value) * s.latent
        flops += 2.0 * s.heads * (pairs * (absorbed if count == 1 else plain) + expanded)
    return Made(lambda: side.kernels.mla_attention(*given), flops)


def rows_of(batch: Batch, page: int, where: torch.device) -> tuple[AttentionRows, int]:
    """The rows of a batch, and how many pages there are. Pages are scattered, and some belong to nobody."""
    needed = [-(-known // page) for known, _ in batch.sequences]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(0))
    pages = [p.clone() for p in order[: sum(needed)].split(needed)]
    slots, prefills, decoding, first = [], [], [], 0
    for (known, count), mine in zip(batch.sequences, pages, strict=True):
        positions = torch.arange(known - count, known)
        slots.append(mine[positions // page] * page + positions % page)
        if count > 1:
            prefills.append(Prefill(first, count, known, mine.to(where)))
        else:
            decoding.append((known, mine))
        first += count
    padded = [mine for _, mine in decoding] or [torch.zeros(0, dtype=torch.int64)]
    table = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)[: len(decoding)]
    lengths = torch.tensor([known for known, _ in decoding], dtype=torch.int64)
    rows = AttentionRows(
        torch.cat(slots).to(where), len(decoding), table.to(where), lengths.to(where), tuple(prefills)
    )
    return rows, len(order)


MAKERS: dict[str, Callable[[Side, Shape, Batch], Made]] = {
    "matrix": _matrix,
    "latent_up": _latent_up,
    "embed": _embed,
    "add": _add,
    "count": _count,
    "linear": _linear,
    "logits": _logits,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "mla_down": _mla_down,
    "mla_up": _mla_up,
    "mla_prologue": _mla_prologue,
    "mla_attention": _mla_attention,
    "router": _router,
    "experts": _experts,
}
