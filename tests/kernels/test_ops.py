"""Every op as it runs on this device against its reference, on ragged, odd and empty shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.errors import InputError
from expertmesh.kernels import Kernels, Rotary, Routing, kernels_for
from expertmesh.kernels.table import OPS, reference_kernels
from tests.support.attention import Sizes, normal, row_count, rows_of

FAST, ORACLE = kernels_for("cpu"), reference_kernels()
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 7, 64]


def close(fast: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits: what is rounded in another order differs in the last ones of the largest number."""
    assert fast.dtype == expected.dtype and fast.shape == expected.shape
    scale = float(expected.float().abs().max()) if expected.numel() else 1.0
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(fast.float(), expected.float(), rtol=0, atol=tolerance * max(scale, 1.0))


def test_every_op_has_an_origin_and_a_reference() -> None:
    assert set(FAST.origin) == set(OPS)
    assert ORACLE.on_reference == list(OPS)
    assert [op for op in OPS if getattr(FAST, op) is getattr(ORACLE, op)] == FAST.on_reference


def test_strict_names_the_ops_without_a_faster_version() -> None:
    if not FAST.on_reference:
        assert kernels_for("cpu", strict=True) == FAST
        return
    with pytest.raises(InputError, match=", ".join(FAST.on_reference)):
        kernels_for("cpu", strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 33, 128])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, width, seed=1, dtype=dtype, scale=5), normal(width, seed=2, dtype=dtype)
    for eps in (1e-6, 1e-5, 0.1):
        close(FAST.rms_norm(x, weight, eps), ORACLE.rms_norm(x, weight, eps), dtype)


def test_rms_norm_of_zeros_and_of_tiny_numbers() -> None:
    for scale in (0.0, 1e-20, 1e15):
        x, weight = normal(3, 16, seed=1, scale=scale), normal(16, seed=2)
        close(FAST.rms_norm(x, weight, 1e-6), ORACLE.rms_norm(x, weight, 1e-6), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows: int, dtype: torch.dtype) -> None:
    x, gate_up = normal(rows, 24, seed=1, dtype=dtype), normal(2 * 17, 24, seed=2, dtype=dtype, scale=0.3)
    down = normal(24, 17, seed=3, dtype=dtype, scale=0.3)
    close(FAST.swiglu(x, gate_up, down), ORACLE.swiglu(x, gate_up, down), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("q_lora", [0, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_mla_down(rows: int, q_lora: int, bias: bool, dtype: torch.dtype) -> None:
    latent, rope, hidden = 16, 8, 40
    arguments: list[Any] = [
        normal(rows, hidden, seed=1, dtype=dtype),
        normal(hidden, seed=2, dtype=dtype),
        1e-5,
        normal(q_lora + latent + rope, hidden, seed=3, dtype=dtype, scale=0.2),
        normal(q_lora + latent + rope, seed=4, dtype=dtype) if bias else None,
        normal(q_lora, seed=5, dtype=dtype) if q_lora else None,
        normal(latent, seed=6, dtype=dtype),
    ]
    fast, expected = FAST.mla_down(*arguments), ORACLE.mla_down(*arguments)
    assert [t.shape[1] for t in fast] == [q_lora or hidden, latent, rope]
    for one, other in zip(fast, expected, strict=True):
        close(one, other, dtype)


# (known tokens, rows of this step) of each sequence: decoding, prefill from the start, chunks, all at once, nothing.
BATCHES = {
    "nothing": [],
    "one_token": [(1, 1)],
    "decoding": [(1, 1), (4, 1), (5, 1), (37, 1)],
    "prefill": [(2, 2), (9, 9), (64, 64)],
    "chunks": [(30, 2), (13, 7), (70, 40)],
    "mixed": [(3, 1), (50, 1), (8, 8), (41, 5), (200, 3)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_mla_up(batch: str, interleaved: bool, dtype: torch.dtype) -> None:
    sizes, q_lora = Sizes(), 20
    rows, pages = rows_of(BATCHES[batch], sizes)
    total = row_count(BATCHES[batch])
    angles = normal(total, 1, sizes.rope // 2, seed=1)
    rotary = Rotary(angles.cos(), angles.sin(), interleaved)
    c_q, c_kv = normal(total, q_lora, seed=2, dtype=dtype), normal(total, sizes.latent, seed=3, dtype=dtype)
    k, q_b = (
        normal(total, sizes.rope, seed=4, dtype=dtype),
        normal(80, q_lora, seed=5, dtype=dtype, scale=0.3),
    )
    before = normal(pages, sizes.page, sizes.cached, seed=6, dtype=dtype)
    caches, outs = [before.clone(), before.clone()], []
    for kernels, cache in zip((FAST, ORACLE), caches, strict=True):
        outs.append(kernels.mla_up(c_q, c_kv, k, q_b, rotary, rows, cache, sizes.heads))
    for one, other in zip(*outs, strict=True):
        close(one, other, dtype)
    close(caches[0], caches[1], dtype)
    untouched = torch.ones(pages * sizes.page, dtype=torch.bool)
    untouched[rows.slots_T] = False
    assert torch.equal(caches[0].flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=1, nope=5, rope=2, value=17, latent=3, page=1)])
def test_mla_attention(batch: str, sizes: Sizes, dtype: torch.dtype) -> None:
    rows, pages = rows_of(BATCHES[batch], sizes)
    total = row_count(BATCHES[batch])
    arguments = attention_arguments(total, pages, sizes, dtype)
    q_n, q_p, cache, kv_b = arguments
    fast = FAST.mla_attention(q_n, q_p, rows, cache, kv_b, 0.4, sizes.value)
    close(fast, ORACLE.mla_attention(q_n, q_p, rows, cache, kv_b, 0.4, sizes.value), dtype)


def attention_arguments(total: int, pages: int, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        normal(total, sizes.heads, sizes.nope, seed=1, dtype=dtype),
        normal(total, sizes.heads, sizes.rope, seed=2, dtype=dtype),
        normal(pages, sizes.page, sizes.cached, seed=3, dtype=dtype),
        normal(sizes.heads * (sizes.nope + sizes.value), sizes.latent, seed=4, dtype=dtype, scale=0.4),
    )


@pytest.mark.parametrize("batch", ["decoding", "prefill", "chunks", "mixed"])
def test_attention_reads_nothing_but_its_own_known_tokens(batch: str) -> None:
    """Other numbers wherever no sequence of the batch has a token: later slots of a last page, pages of others."""
    sizes = Sizes()
    rows, pages = rows_of(BATCHES[batch], sizes)
    q_n, q_p, cache, kv_b = attention_arguments(row_count(BATCHES[batch]), pages, sizes, torch.float32)
    expected = FAST.mla_attention(q_n, q_p, rows, cache, kv_b, 0.4, sizes.value)
    known = torch.zeros(pages, sizes.page, dtype=torch.bool)
    lengths = rows.lengths_B.tolist() + [p.length for p in rows.prefills]
    held = [*rows.pages_BM, *(p.pages_M for p in rows.prefills)]
    for length, mine in zip(lengths, held, strict=True):
        positions = torch.arange(length)
        known[mine[positions // sizes.page], positions % sizes.page] = True
    # Finite ones, since 0 * NaN is NaN: masked tokens have weights of exactly 0.
    poisoned = cache.where(known.unsqueeze(-1), torch.full_like(cache, 1e4))
    assert torch.equal(FAST.mla_attention(q_n, q_p, rows, poisoned, kv_b, 0.4, sizes.value), expected)


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


def weights_by_expert(kernels: Kernels, logits: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """[T, E]: each expert's weight, since the order of the chosen is nobody's business."""
    experts, weights = kernels.route(logits, bias, routing)
    assert experts.dtype == torch.int64 and weights.dtype == torch.float32
    assert experts.shape == weights.shape == (logits.shape[0], routing.experts_per_token)
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    return torch.zeros_like(logits).scatter(1, experts, weights)


@given(routings())
def test_route(case: tuple[Tensor, Tensor | None, Routing]) -> None:
    torch.testing.assert_close(weights_by_expert(FAST, *case), weights_by_expert(ORACLE, *case))


@st.composite
def expert_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    rows, choices, slots = draw(st.integers(0, 40)), draw(st.integers(1, 8)), draw(st.integers(1, 20))
    hidden, inner = draw(st.integers(1, 24)), draw(st.integers(1, 24))
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


@given(expert_batches())
def test_experts(case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    close(FAST.experts(*case), ORACLE.experts(*case), case[0].dtype)


@pytest.mark.parametrize("slots", [3, 64])
def test_experts_large_enough_to_be_read_one_by_one(slots: int) -> None:
    """Both ways that experts can be computed: all slots at once, or only those that were hit."""
    case = (
        normal(50, 96, seed=1),
        torch.randint(-1, slots, (50, 2), generator=torch.Generator().manual_seed(2)),
        torch.rand(50, 2, generator=torch.Generator().manual_seed(3)),
        normal(slots, 2 * 320, 96, seed=4, scale=0.1),
        normal(slots, 96, 320, seed=5, scale=0.1),
    )
    close(FAST.experts(*case), ORACLE.experts(*case), torch.float32)
    one_row = (case[0][:1], torch.tensor([[slots - 1, -1]]), case[2][:1], *case[3:])
    close(FAST.experts(*one_row), ORACLE.experts(*one_row), torch.float32)
