"""What a row gives does not depend, in any bit, on the other rows of its batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expertmesh.kernels import Queries, Rotary, Routing
from expertmesh.kernels.types import AttentionRows
from tests.kernels.test_ops import NATIVE, Kind, attention_arguments, down_arguments
from tests.support.attention import Sizes, normal, rows_of

BF16 = torch.bfloat16
ROWS = 70
SOME = [[0], [22], [69], [3, 40], list(range(17)), list(range(5, 38)), list(range(ROWS))]
each_kind = pytest.mark.parametrize("kind", NATIVE, ids=repr)


def same_alone(op: Callable[[Tensor], Tensor]) -> None:
    """op: from rows [70, 200] of a batch, given by their numbers, to what they give."""
    whole = op(torch.arange(ROWS))
    for some in SOME:
        rows = torch.tensor(some)
        assert torch.equal(op(rows), whole[rows]), some


X = normal(ROWS, 200, seed=1, dtype=BF16)


@each_kind
def test_linear(kind: Kind) -> None:
    weight = kind.matrix(normal(90, 200, seed=2, dtype=BF16, scale=0.1))
    same_alone(lambda rows: kind.kernels.linear(X[rows], weight))


@each_kind
def test_swiglu(kind: Kind) -> None:
    gate_up = kind.matrix(normal(2 * 70, 200, seed=2, dtype=BF16, scale=0.1), 2)
    down = kind.matrix(normal(200, 70, seed=3, dtype=BF16, scale=0.1))
    same_alone(lambda rows: kind.kernels.swiglu(X[rows], gate_up, down))


@each_kind
def test_router(kind: Kind) -> None:
    routing = Routing(3, 4, 2, "noaux_tc", "sigmoid", True, 2.5)
    weight, bias = normal(20, 200, seed=2, scale=0.1), normal(20, seed=3)
    same_alone(lambda rows: kind.kernels.router(X[rows], weight, bias, routing)[0])
    same_alone(lambda rows: kind.kernels.router(X[rows], weight, bias, routing)[1])


@each_kind
def test_experts(kind: Kind) -> None:
    slots = torch.randint(-1, 6, (ROWS, 4), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(3))
    gate_up = kind.matrix(normal(6, 2 * 48, 200, seed=4, scale=0.1, dtype=BF16), 2)
    down = kind.matrix(normal(6, 200, 48, seed=5, scale=0.1, dtype=BF16))
    same_alone(lambda rows: kind.kernels.experts(X[rows], slots[rows], weights[rows], gate_up, down))


@each_kind
def test_prologue_and_attention_of_rows_that_decode(kind: Kind) -> None:
    sizes = Sizes(heads=5, nope=32, rope=16, value=24, latent=48, page=32)
    known = [(1 + 31 * i % 700, 1) for i in range(ROWS)]
    rows, pages = rows_of(known, sizes)
    *_, before, kv_b = attention_arguments(0, pages, sizes, BF16)
    q_b = kind.matrix(normal(sizes.heads * 48, 20, seed=5, dtype=BF16, scale=0.2), sizes.heads)
    down = down_arguments(ROWS, 20, True, sizes, BF16)
    down[3] = kind.matrix(down[3])
    up = kind.latent_up(kv_b, sizes)
    angles = normal(700, sizes.rope // 2, seed=1)

    def op(some: Tensor) -> Tensor:
        mine = AttentionRows(rows.slots_T[some], len(some), rows.pages_BM[some], rows.lengths_B[some], ())
        rotary = Rotary(mine.lengths_B - 1, angles.cos(), angles.sin(), True)
        cache = before.clone()
        queries = kind.kernels.mla_prologue(
            down[0][some], *down[1:], q_b, up, rotary, mine, cache, sizes.heads
        )
        return kind.kernels.mla_attention(queries, mine, cache, up, 0.2, sizes.value)

    same_alone(op)


@each_kind
def test_attention_of_a_prompt_in_one_piece_or_in_several(kind: Kind) -> None:
    sizes = Sizes(heads=3, nope=32, rope=16, value=24, latent=48, page=32)
    length = 700
    rows, pages = rows_of([(length, length)], sizes)
    q_n, q_p, cache, kv_b = attention_arguments(length, pages, sizes, BF16)
    plain, up = torch.cat((q_n, q_p), -1), kind.latent_up(kv_b, sizes)
    nothing = plain.new_empty(0, sizes.heads, sizes.cached)

    def last(known: int, count: int) -> Tensor:
        (prompt,) = rows.prefills
        some, _ = rows_of([(known, count)], sizes)
        (part,) = some.prefills
        part = type(part)(0, count, known, prompt.pages_M)
        mine = AttentionRows(some.slots_T, 0, some.pages_BM, some.lengths_B, (part,))
        queries = Queries(plain[known - count : known].contiguous(), nothing)
        return kind.kernels.mla_attention(queries, mine, cache, up, 0.2, sizes.value)

    whole = last(length, length)
    for known, count in ((300, 300), (520, 220), (700, 180)):
        assert torch.equal(last(known, count), whole[known - count : known])
