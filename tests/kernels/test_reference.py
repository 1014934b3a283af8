"""The reference of every op against loops over single numbers: the oracle of all other versions must be right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from expertmesh.kernels import Queries, Rotary, Routing, reference
from expertmesh.kernels.reference import LATENT_EPS
from tests.kernels.test_ops import BATCHES, attention_arguments, expert_batches, routings
from tests.support.attention import Sizes, normal, row_count, rows_of


def test_rms_norm_and_its_epsilon() -> None:
    x, weight = [0.001, -0.002], [2.0, 3.0]
    root = math.sqrt((0.001**2 + 0.002**2) / 2 + 1e-6)
    found = reference.rms_norm(torch.tensor([x]), torch.tensor(weight), 1e-6)
    expected = torch.tensor([[a / root * w for a, w in zip(x, weight, strict=True)]])
    torch.testing.assert_close(found, expected)


def test_latent_norms_have_their_own_epsilon() -> None:
    """rms_norm_eps is of the layer's norm alone."""
    latent = torch.tensor([[1e-3, 2e-3]])
    _, c_kv, k = reference.mla_down(
        torch.tensor([[1.0, 1.0]]), torch.ones(2), 0.0, torch.diag(latent[0]), None, None, torch.ones(2)
    )
    expected = latent / (latent.square().mean() + LATENT_EPS).sqrt()
    assert LATENT_EPS == 1e-6 and k.shape == (1, 0)
    torch.testing.assert_close(c_kv, expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_multiplication_of_complex_numbers(interleaved: bool) -> None:
    x, angles = normal(5, 3, 8, seed=1), normal(5, 1, 4, seed=2, scale=3)
    cos, sin = angles.squeeze(1).cos(), angles.squeeze(1).sin()
    out = reference.rotate(x, Rotary(torch.arange(5), cos, sin, interleaved))
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    turned = torch.complex(first, second) * torch.polar(torch.ones(5, 1, 4), angles)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("batch", BATCHES)
def test_attention(batch: str) -> None:
    """Every row on its own: scores over the tokens up to it, found page by page."""
    sizes = Sizes()
    rows, pages = rows_of(BATCHES[batch], sizes, seed=9)
    q_n, q_p, cache, kv_b = attention_arguments(row_count(BATCHES[batch]), pages, sizes, torch.float32)
    plain = torch.cat((q_n, q_p), -1)
    found = reference.mla_attention(Queries(plain, plain[:0]), rows, cache, kv_b, 0.4, sizes.value)
    flat = cache.flatten(0, 1)
    expected = torch.zeros_like(found).view(-1, sizes.heads, sizes.value)
    for row, slots in enumerate(slots_seen(BATCHES[batch], rows_of(BATCHES[batch], sizes, seed=9)[0], sizes)):
        for head in range(sizes.heads):
            expected[row, head] = one_row(q_n[row, head], q_p[row, head], flat[slots], kv_b, head, sizes)
    torch.testing.assert_close(found, expected.flatten(1), atol=1e-5, rtol=1e-5)


def slots_seen(batch: list[tuple[int, int]], rows: object, sizes: Sizes) -> list[Tensor]:
    """Cache slots of the tokens that each row may see, its own last."""
    held = [*rows.pages_BM, *(p.pages_M for p in rows.prefills)]  # type: ignore[attr-defined]
    seen = []
    for (known, count), pages in zip(batch, held, strict=True):
        for last in range(known - count, known):
            positions = torch.arange(last + 1)
            seen.append(pages[positions // sizes.page] * sizes.page + positions % sizes.page)
    return seen


def one_row(q_n: Tensor, q_p: Tensor, known: Tensor, kv_b: Tensor, head: int, sizes: Sizes) -> Tensor:
    up = kv_b.view(sizes.heads, -1, sizes.latent)[head].double()
    latents, rope = known[:, : sizes.latent].double(), known[:, sizes.latent :].double()
    keys, values = latents @ up[: sizes.nope].T, latents @ up[sizes.nope :].T
    scores = (keys @ q_n.double() + rope @ q_p.double()) * 0.4
    return (scores.softmax(0) @ values).float()


@given(routings())
def test_route(case: tuple[Tensor, Tensor | None, Routing]) -> None:
    logits, bias, routing = case
    experts, weights = reference.route(*case)
    for row in range(logits.shape[0]):
        scores = logits[row].sigmoid() if routing.scoring == "sigmoid" else logits[row].softmax(-1)
        choice = (scores if bias is None else scores + bias).tolist()
        allowed = (
            members_of_best_groups(choice, routing) if routing.method != "greedy" else range(len(choice))
        )
        expected = sorted(allowed, key=lambda e: -choice[e])[: routing.experts_per_token]
        # Compared by what they are worth: of equal ones either may be chosen.
        assert sorted(choice[e] for e in experts[row].tolist()) == sorted(choice[e] for e in expected)
        assert set(experts[row].tolist()) <= set(allowed) or ties(choice)
        mine = scores[experts[row]]
        total = mine.sum() if routing.normalise else 1.0
        torch.testing.assert_close(weights[row], mine / total * routing.scale)


def members_of_best_groups(choice: list[float], routing: Routing) -> list[int]:
    size = len(choice) // routing.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(routing.groups)]
    count = min(2, size) if routing.method == "noaux_tc" else 1
    # Added in float32, as the op does: equal sums must stay equal.
    worth = [float(np.sum(np.sort(np.float32([choice[e] for e in m]))[::-1][:count])) for m in members]
    best = sorted(range(routing.groups), key=lambda g: -worth[g])[: routing.groups_per_token]
    return [e for g in best for e in members[g]]


def ties(choice: list[float]) -> bool:
    return len(set(choice)) < len(choice)


def test_groups_not_chosen_lose_even_against_negative_scores() -> None:
    """With 0 in place of -inf, experts 2 and 3 of the group not chosen would beat the chosen group's -2.5."""
    logits, bias = torch.zeros(1, 4), torch.tensor([-1.0, -3.0, -2.4, -2.4])
    routing = Routing(
        2, groups=2, groups_per_token=1, method="noaux_tc", scoring="sigmoid", normalise=True, scale=1.0
    )
    experts, weights = reference.route(logits, bias, routing)
    assert sorted(experts[0].tolist()) == [0, 1]
    assert weights.tolist() == [[0.5, 0.5]]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([10.0, 0.0, 0.0])
    routing = Routing(
        1, groups=1, groups_per_token=1, method="noaux_tc", scoring="sigmoid", normalise=False, scale=3.0
    )
    experts, weights = reference.route(logits, bias, routing)
    assert experts.tolist() == [[0]] and weights.tolist() == [[1.5]]


@given(expert_batches())
def test_experts(case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    x, slots, weights, gate_up, down = case
    found = reference.experts(*case)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for slot, weight in zip(slots[row].tolist(), weights[row].tolist(), strict=True):
            if slot >= 0:
                gate, up = (gate_up[slot].double() @ x[row].double()).chunk(2)
                expected[row] += weight * (down[slot].double() @ (gate * gate.sigmoid() * up))
    tolerance = 1e-5 if x.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.double(), expected, atol=tolerance * 8, rtol=tolerance)


def test_swiglu_gates_with_the_first_half() -> None:
    gate_up, down = torch.tensor([[1.0], [10.0]]), torch.tensor([[2.0]])
    expected = 2.0 * 10.0 * 1.5 * 1.5 / (1 + math.exp(-1.5))
    torch.testing.assert_close(
        reference.swiglu(torch.tensor([[1.5]]), gate_up, down), torch.tensor([[expected]])
    )
