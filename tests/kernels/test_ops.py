"""Every op as it runs on this device against its reference, on ragged, odd and empty shapes."""

import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.config.precision import PLAIN
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels, Queries, Rotary, Routing, kernels_for
from expertmesh.kernels.cpu import Cpu, variants
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.packed import Packed
from expertmesh.kernels.table import OPS, kernels_of, reference_kernels
from expertmesh.native import COMPILERS, NotBuilt
from tests.support.attention import Sizes, normal, row_count, rows_of


@dataclass(frozen=True)
class Kind:
    """Kernels as they run on weights of one type."""

    name: str
    kernels: Kernels
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"{self.name}-{self.dtype}"

    def matrix(self, weight: Tensor, split: int = 1) -> Any:
        """As these kernels keep it."""
        kept = Kept(weight.dtype, weight.device)
        made = self.kernels.matrix(tuple(weight.shape), split, PLAIN, kept)
        if isinstance(made, Packed):
            for slot in range(weight.shape[0]) if weight.dim() == 3 else ():
                made[slot, : weight.shape[1] // 2].copy_(weight[slot, : weight.shape[1] // 2])
                made[slot, weight.shape[1] // 2 :].copy_(weight[slot, weight.shape[1] // 2 :])
        if weight.dim() == 2 or not isinstance(made, Packed):
            made.copy_(weight)
        return made

    def latent_up(self, kv_b: Tensor, sizes: Sizes) -> Any:
        kept = Kept(kv_b.dtype, kv_b.device)
        made = self.kernels.latent_up(sizes.heads, sizes.nope, sizes.value, sizes.latent, kept)
        made.copy_(kv_b)
        return made


def native_kinds() -> list[Kind]:
    """One for each way that this processor can run the CPU's own kernels."""
    try:
        return [Kind(v.name, kernels_of(Cpu(v)), torch.bfloat16) for v in variants()]
    except NotBuilt:
        return []


ORACLE = reference_kernels()
EAGER = [Kind("eager", kernels_for("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)]
NATIVE = native_kinds()
KINDS = EAGER + NATIVE
each_kind = pytest.mark.parametrize("kind", KINDS, ids=repr)
ROWS = [0, 1, 7, 17, 64]


def close(fast: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits: what is rounded in another order differs in the last ones of the largest number."""
    assert fast.dtype == expected.dtype and fast.shape == expected.shape
    scale = float(expected.float().abs().max()) if expected.numel() else 1.0
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(fast.float(), expected.float(), rtol=0, atol=tolerance * max(scale, 1.0))


def test_every_op_has_an_origin_and_a_reference() -> None:
    fast = EAGER[0].kernels
    assert set(fast.origin) == set(OPS)
    assert ORACLE.on_reference == list(OPS)
    assert [op for op in OPS if getattr(fast, op) is getattr(ORACLE, op)] == fast.on_reference


def test_strict_names_the_ops_without_a_faster_version() -> None:
    with pytest.raises(InputError, match=", ".join(EAGER[0].kernels.on_reference)):
        kernels_for("cpu", strict=True)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_kernels_are_built_where_there_is_a_compiler() -> None:
    """Without them most tests of this folder have nothing to test."""
    assert [kind.name for kind in NATIVE] == [variant.name for variant in variants()]


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_every_op_has_a_native_version() -> None:
    assert kernels_for("cpu", "bfloat16", strict=True).origin == dict.fromkeys(OPS, NATIVE[0].name)


@each_kind
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 33, 128])
def test_rms_norm(rows: int, width: int, kind: Kind) -> None:
    x, weight = (
        normal(rows, width, seed=1, dtype=kind.dtype, scale=5),
        normal(width, seed=2, dtype=kind.dtype),
    )
    for eps in (1e-6, 1e-5, 0.1):
        close(kind.kernels.rms_norm(x, weight, eps), ORACLE.rms_norm(x, weight, eps), kind.dtype)


@each_kind
def test_rms_norm_of_zeros_and_of_tiny_numbers(kind: Kind) -> None:
    for scale in (0.0, 1e-20, 1e15):
        x, weight = normal(3, 16, seed=1, scale=scale).to(kind.dtype), normal(16, seed=2).to(kind.dtype)
        close(kind.kernels.rms_norm(x, weight, 1e-6), ORACLE.rms_norm(x, weight, 1e-6), kind.dtype)


@each_kind
@pytest.mark.parametrize("rows", ROWS)
def test_rows_that_are_looked_up_and_added(rows: int, kind: Kind) -> None:
    table, tokens = normal(50, 33, seed=1, dtype=kind.dtype), torch.arange(rows) % 50
    found = kind.kernels.embed(tokens, table)
    assert torch.equal(found, table[tokens])
    close(kind.kernels.add(found, found), ORACLE.add(found, found), kind.dtype)


@each_kind
def test_counting_goes_on_from_what_is_there(kind: Kind) -> None:
    counts = torch.tensor([5, 0, 1, 0])
    for _ in range(2):
        kind.kernels.count(torch.tensor([[0, 2], [2, 3]]), counts)
    assert counts.tolist() == [7, 0, 5, 2]


@each_kind
@pytest.mark.parametrize("rows", [*ROWS, 100, 300])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (48, 64), (300, 2100)])
def test_linear_and_logits(rows: int, shape: tuple[int, int], kind: Kind) -> None:
    x, bias = normal(rows, shape[1], seed=1, dtype=kind.dtype), normal(shape[0], seed=3, dtype=kind.dtype)
    weight = normal(*shape, seed=2, dtype=kind.dtype, scale=shape[1] ** -0.5)
    kept = kind.matrix(weight)
    for b in (None, bias):
        close(kind.kernels.linear(x, kept, b), ORACLE.linear(x, weight, b), kind.dtype)
    close(kind.kernels.logits(x, kept), ORACLE.logits(x, weight), kind.dtype)
    every_other = normal(rows, 2 * shape[1], seed=4, dtype=kind.dtype)[:, ::2]
    close(kind.kernels.linear(every_other, kept), ORACLE.linear(every_other, weight), kind.dtype)


@each_kind
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inner", [17, 64])
def test_swiglu(rows: int, inner: int, kind: Kind) -> None:
    x, gate_up = (
        normal(rows, 24, seed=1, dtype=kind.dtype),
        normal(2 * inner, 24, seed=2, dtype=kind.dtype, scale=0.3),
    )
    down = normal(24, inner, seed=3, dtype=kind.dtype, scale=0.3)
    found = kind.kernels.swiglu(x, kind.matrix(gate_up, 2), kind.matrix(down))
    close(found, ORACLE.swiglu(x, gate_up, down), kind.dtype)


def down_arguments(rows: int, q_lora: int, bias: bool, sizes: Sizes, dtype: torch.dtype) -> list[Any]:
    hidden, low = 40, q_lora + sizes.latent + sizes.rope
    return [
        normal(rows, hidden, seed=1, dtype=dtype),
        normal(hidden, seed=2, dtype=dtype),
        1e-5,
        normal(low, hidden, seed=3, dtype=dtype, scale=0.2),
        normal(low, seed=4, dtype=dtype) if bias else None,
        normal(q_lora, seed=5, dtype=dtype) if q_lora else None,
        normal(sizes.latent, seed=6, dtype=dtype),
    ]


@each_kind
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("q_lora", [0, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_mla_down(rows: int, q_lora: int, bias: bool, kind: Kind) -> None:
    sizes = Sizes()
    arguments = down_arguments(rows, q_lora, bias, sizes, kind.dtype)
    expected = ORACLE.mla_down(*arguments)
    arguments[3] = kind.matrix(arguments[3])
    fast = kind.kernels.mla_down(*arguments)
    assert [t.shape[1] for t in fast] == [q_lora or 40, sizes.latent, sizes.rope]
    for one, other in zip(fast, expected, strict=True):
        close(one, other, kind.dtype)


# (known tokens, rows of this step) of each sequence: decoding, prefill from the start, chunks, all at once, nothing.
BATCHES = {
    "nothing": [],
    "one_token": [(1, 1)],
    "decoding": [(1, 1), (4, 1), (5, 1), (37, 1)],
    "prefill": [(2, 2), (9, 9), (64, 64)],
    "chunks": [(30, 2), (13, 7), (70, 40)],
    "mixed": [(3, 1), (50, 1), (8, 8), (41, 5), (200, 3)],
}


SIZES = [
    Sizes(),
    Sizes(heads=1, nope=5, rope=2, value=17, latent=3, page=1),
    Sizes(heads=17, nope=32, rope=16, value=33, latent=64, page=32),
]
each_batch = pytest.mark.parametrize("batch", BATCHES)
each_size = pytest.mark.parametrize("sizes", SIZES, ids=["small", "odd", "large"])


def plain_queries(queries: Queries, kv_b: Tensor, rows: int, sizes: Sizes) -> Tensor:
    """All queries in the space of the latents, [T, H, C + P], whichever way they came."""
    keys = kv_b.view(sizes.heads, sizes.nope + sizes.value, -1)[:, : sizes.nope].float()
    plain = queries.plain.float()
    inside = torch.einsum("thn,hnc->thc", plain[..., : sizes.nope], keys)
    found = torch.cat((inside, plain[..., sizes.nope :]), -1)
    if queries.absorbed.shape[0]:
        found = torch.cat((queries.absorbed.float(), found))
    assert found.shape == (rows, sizes.heads, sizes.cached)
    return found


@each_kind
@each_size
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_lora", [0, 20])
@each_batch
def test_mla_up_and_both_halves_in_one(
    batch: str, q_lora: int, interleaved: bool, sizes: Sizes, kind: Kind
) -> None:
    rows, pages = rows_of(BATCHES[batch], sizes)
    total, dtype = row_count(BATCHES[batch]), kind.dtype
    angles = normal(300, sizes.rope // 2, seed=1)
    rotary = Rotary(torch.arange(total) * 2 % 300, angles.cos(), angles.sin(), interleaved)
    wide = sizes.heads * (sizes.nope + sizes.rope)
    q_b = normal(wide, q_lora or 40, seed=5, dtype=dtype, scale=0.2)
    _, _, _, kv_b = attention_arguments(0, 1, sizes, dtype)
    before = normal(pages, sizes.page, sizes.cached, seed=6, dtype=dtype)
    down = down_arguments(total, q_lora, True, sizes, dtype)
    low = ORACLE.mla_down(*down)
    expected_cache = before.clone()
    up = (rotary, rows, expected_cache, sizes.heads)
    expected = plain_queries(ORACLE.mla_up(*low, q_b, kv_b, *up), kv_b, total, sizes)
    untouched = torch.ones(pages * sizes.page, dtype=torch.bool)
    untouched[rows.slots_T] = False
    kept = kind.matrix(q_b, sizes.heads), kind.latent_up(kv_b, sizes)
    down[3] = kind.matrix(down[3])
    for whole in (False, True):
        cache = before.clone()
        up = (*kept, rotary, rows, cache, sizes.heads)
        found = kind.kernels.mla_prologue(*down, *up) if whole else kind.kernels.mla_up(*low, *up)
        close(plain_queries(found, kv_b, total, sizes), expected, dtype)
        close(cache, expected_cache, dtype)
        assert torch.equal(cache.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


def attention_arguments(total: int, pages: int, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q_N, q_P, cache, kv_b."""
    return (
        normal(total, sizes.heads, sizes.nope, seed=1, dtype=dtype),
        normal(total, sizes.heads, sizes.rope, seed=2, dtype=dtype),
        normal(pages, sizes.page, sizes.cached, seed=3, dtype=dtype),
        normal(sizes.heads * (sizes.nope + sizes.value), sizes.latent, seed=4, dtype=dtype, scale=0.4),
    )


def as_taken(kind: Kind, plain: Tensor, absorbed: int, kv_b: Tensor, sizes: Sizes) -> Queries:
    """Plain queries as this kind of kernels takes them."""
    if kind in EAGER:
        return Queries(plain, plain[:0])
    some = Queries(plain[:absorbed], plain.new_empty(0, sizes.heads, sizes.cached))
    inside = plain_queries(some, kv_b, absorbed, sizes).to(kind.dtype)
    return Queries(plain[absorbed:].contiguous(), inside.contiguous())


@each_kind
@each_size
@each_batch
def test_mla_attention(batch: str, sizes: Sizes, kind: Kind) -> None:
    rows, pages = rows_of(BATCHES[batch], sizes)
    q_n, q_p, cache, kv_b = attention_arguments(row_count(BATCHES[batch]), pages, sizes, kind.dtype)
    plain = torch.cat((q_n, q_p), -1)
    scale = sizes.cached**-0.5
    queries = as_taken(kind, plain, rows.decoding, kv_b, sizes)
    kept = kind.latent_up(kv_b, sizes)
    fast = kind.kernels.mla_attention(queries, rows, cache, kept, scale, sizes.value)
    expected = ORACLE.mla_attention(Queries(plain, plain[:0]), rows, cache, kv_b, scale, sizes.value)
    close(fast, expected, kind.dtype)


@each_kind
@pytest.mark.parametrize("batch", ["decoding", "prefill", "chunks", "mixed"])
def test_attention_reads_nothing_but_its_own_known_tokens(batch: str, kind: Kind) -> None:
    """Other numbers wherever no sequence of the batch has a token: later slots of a last page, pages of others."""
    sizes = Sizes()
    rows, pages = rows_of(BATCHES[batch], sizes)
    q_n, q_p, cache, kv_b = attention_arguments(row_count(BATCHES[batch]), pages, sizes, kind.dtype)
    queries = as_taken(kind, torch.cat((q_n, q_p), -1), rows.decoding, kv_b, sizes)
    kept = kind.latent_up(kv_b, sizes)
    expected = kind.kernels.mla_attention(queries, rows, cache, kept, 0.4, sizes.value)
    known = torch.zeros(pages, sizes.page, dtype=torch.bool)
    lengths = rows.lengths_B.tolist() + [p.length for p in rows.prefills]
    held = [*rows.pages_BM, *(p.pages_M for p in rows.prefills)]
    for length, mine in zip(lengths, held, strict=True):
        positions = torch.arange(length)
        known[mine[positions // sizes.page], positions % sizes.page] = True
    # Finite ones, since 0 * NaN is NaN: masked tokens have weights of exactly 0.
    poisoned = cache.where(known.unsqueeze(-1), torch.full_like(cache, 1e4))
    assert torch.equal(kind.kernels.mla_attention(queries, rows, poisoned, kept, 0.4, sizes.value), expected)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Routing]:
    scoring, method = draw(
        st.sampled_from([("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy")])
    )
    groups, size = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    kept = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, (groups if method == "greedy" else kept) * size))
    seed, rows = draw(st.integers(0, 2**32)), draw(st.integers(0, 9))
    logits = normal(rows, groups * size, seed=seed, scale=draw(st.sampled_from([0.1, 1.0, 8.0])))
    bias = normal(groups * size, seed=seed + 1) + draw(st.sampled_from([-30.0, -1.0, 0.0, 5.0]))
    routing = Routing(
        experts_per_token=chosen, groups=groups, groups_per_token=kept, method=method, scoring=scoring,
        normalise=scoring == "sigmoid" and draw(st.booleans()), scale=draw(st.sampled_from([1.0, 2.5, 16.0])),
    )  # fmt: skip
    return logits, bias if method == "noaux_tc" else None, routing


def weights_by_expert(kernels: Kernels, case: tuple[Tensor, Tensor | None, Routing]) -> Tensor:
    """[T, E]: each expert's weight, since the order of the chosen is nobody's business."""
    logits, bias, routing = case
    experts, weights = kernels.router(logits, torch.eye(logits.shape[1]), bias, routing)
    assert experts.dtype == torch.int64 and weights.dtype == torch.float32
    assert experts.shape == weights.shape == (logits.shape[0], routing.experts_per_token)
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    return torch.zeros(logits.shape).scatter(1, experts, weights)


@each_kind
@given(case=routings())
def test_router(case: tuple[Tensor, Tensor | None, Routing], kind: Kind) -> None:
    logits, bias, routing = case
    # Numbers of bfloat16 are equal now and then, and either of two equal experts may be chosen.
    distinct = logits.shape[1] * torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(1))
    logits = logits + 0.01 * distinct
    if kind.dtype == torch.bfloat16:
        logits = logits.bfloat16()
        if any(len(set(row)) < len(row) for row in logits.tolist()):
            return
    case = logits, bias, routing
    torch.testing.assert_close(weights_by_expert(kind.kernels, case), weights_by_expert(ORACLE, case))


@each_kind
def test_router_multiplies_in_float32(kind: Kind) -> None:
    routing = Routing(3, 4, 2, "noaux_tc", "sigmoid", True, 2.5)
    x, weight = normal(37, 100, seed=1).to(kind.dtype), normal(20, 100, seed=2, scale=0.1)
    bias = normal(20, seed=3)
    case = (x.float() @ weight.t(), bias, routing)
    experts, weights = kind.kernels.router(x, weight, bias, routing)
    found = torch.zeros(37, 20).scatter(1, experts, weights)
    torch.testing.assert_close(found, weights_by_expert(ORACLE, case), atol=1e-4, rtol=1e-4)


@st.composite
def expert_batches(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    rows, choices, slots = draw(st.integers(0, 40)), draw(st.integers(1, 8)), draw(st.integers(1, 20))
    hidden, inner = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    # From "none is mine" to "all are"; low skews to the first slot.
    missing, skewed = draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.booleans())
    slots_rk = torch.randint(1 if skewed else slots, (rows, choices), generator=generator)
    slots_rk[torch.rand(rows, choices, generator=generator) < missing] = -1
    return (
        normal(rows, hidden, seed=seed, dtype=dtype),
        slots_rk,
        torch.rand(rows, choices, generator=generator),
        normal(slots, 2 * inner, hidden, seed=seed + 1, dtype=dtype, scale=hidden**-0.5),
        normal(slots, hidden, inner, seed=seed + 2, dtype=dtype, scale=inner**-0.5),
    )


@each_kind
@given(data=st.data())
def test_experts(data: st.DataObject, kind: Kind) -> None:
    *rows, gate_up, down = data.draw(expert_batches(kind.dtype))
    found = kind.kernels.experts(*rows, kind.matrix(gate_up, 2), kind.matrix(down))
    close(found, ORACLE.experts(*rows, gate_up, down), kind.dtype)


@each_kind
@pytest.mark.parametrize("slots", [3, 64])
def test_experts_of_more_size(slots: int, kind: Kind) -> None:
    """All ways that experts can be computed: all slots at once, or only those that were hit, with many rows each or a
    few."""
    rows = (
        normal(150, 96, seed=1, dtype=kind.dtype),
        torch.randint(-1, slots, (150, 2), generator=torch.Generator().manual_seed(2)),
        torch.rand(150, 2, generator=torch.Generator().manual_seed(3)),
    )
    gate_up = normal(slots, 2 * 320, 96, seed=4, scale=0.1, dtype=kind.dtype)
    down = normal(slots, 96, 320, seed=5, scale=0.1, dtype=kind.dtype)
    kept = kind.matrix(gate_up, 2), kind.matrix(down)
    close(kind.kernels.experts(*rows, *kept), ORACLE.experts(*rows, gate_up, down), kind.dtype)
    one_row = (rows[0][:1], torch.tensor([[slots - 1, -1]]), rows[2][:1])
    close(kind.kernels.experts(*one_row, *kept), ORACLE.experts(*one_row, gate_up, down), kind.dtype)
