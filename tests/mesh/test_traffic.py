"""The law of rows and bytes, against counts that know nothing of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, Topology
from expertmesh.mesh.traffic import (
    ALGORITHMS,
    ANNOUNCEMENT,
    FORMATS,
    Traffic,
    algorithm,
    message_bytes,
    rows_bytes,
    traffic,
)
from tests.support.cluster import Case, cases

WIDTH = 64


def predicted(case: Case, name: str) -> Traffic:
    return traffic(
        case.slots, case.topology, case.placement.slots_per_rank, WIDTH, "bfloat16", algorithm(name)
    )


@given(cases(), st.sampled_from(sorted(ALGORITHMS)))
def test_rows_of_a_rank_are_its_chosen_slots(case: Case, name: str) -> None:
    size = case.placement.slots_per_rank
    chosen = np.concatenate([s.ravel() for s in case.slots]) // size
    assert (
        predicted(case, name).rows_R.tolist() == np.bincount(chosen, minlength=case.topology.ranks).tolist()
    )


@given(cases())
def test_combine_of_two_tiers_carries_a_row_per_token_and_node(case: Case) -> None:
    """Without headers and scales combine is rows alone, so it can be counted in rows."""
    size, cards = case.placement.slots_per_rank, case.topology.cards_per_node
    found = predicted(case, "two_tier").combine_RR
    row = rows_bytes(1, WIDTH, FORMATS["bfloat16"])
    expected = np.zeros_like(found)
    for rank, slots in enumerate(case.slots):
        for token in slots:
            for node in {int(s) // size // cards for s in token}:
                peer = node * cards + rank % cards
                expected[peer, rank] += row * (peer != rank)
                for card in {int(s) // size for s in token if int(s) // size // cards == node}:
                    expected[card, peer] += row * (card != peer)
    assert (found == expected).all()


@given(cases())
def test_flat_sends_a_copy_per_choice(case: Case) -> None:
    size = case.placement.slots_per_rank
    found = predicted(case, "flat").combine_RR
    row = rows_bytes(1, WIDTH, FORMATS["bfloat16"])
    expected = np.zeros_like(found)
    for rank, slots in enumerate(case.slots):
        for slot in slots.ravel():
            expected[slot // size, rank] += row * (slot // size != rank)
    assert (found == expected).all()


@given(cases(), st.sampled_from(["two_tier", "two_tier_int8", "two_tier_fp8_both"]))
def test_no_link_carries_more_than_its_rail(case: Case, name: str) -> None:
    """Only peers on a rail talk across nodes, and none of these links carries more than every row of its sender once:
    what a law shared by prediction and sender cannot hide."""
    found, cards = predicted(case, name), case.topology.cards_per_node
    ranks = np.arange(case.topology.ranks)
    across = ranks[:, None] // cards != ranks // cards
    off_rail = ranks[:, None] % cards != ranks % cards
    assert not found.dispatch_RR[across & off_rail].any() and not found.combine_RR[across & off_rail].any()
    for rank in ranks:
        rows, choices = case.slots[rank].shape
        most = ANNOUNCEMENT + 8 * 8 + rows * (2 * WIDTH + 8 + 1 + 8 * choices)
        assert found.dispatch_RR[rank][across[rank]].max(initial=0) <= most
        assert found.combine_RR[:, rank][across[rank]].max(initial=0) <= most


@given(cases())
def test_merging_never_sends_more_rows_across(case: Case) -> None:
    flat, tiered = predicted(case, "flat"), predicted(case, "two_tier")
    assert tiered.across("combine", case.topology) <= flat.across("combine", case.topology)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "int8", "fp8"])
@pytest.mark.parametrize("width", [1, 7, 128, 129, 7168])
def test_a_message_is_little_more_than_its_rows(name: str, width: int) -> None:
    form = FORMATS[name]
    plain = 10 * width * form.itemsize + 10 * form.scales(width) * 4
    assert plain <= rows_bytes(10, width, form) < plain + 16
    assert 0 <= message_bytes(10, 25, width, form) - (plain + 8 + 10 + 25 * 8) < 8 * 5
    assert message_bytes(0, 0, width, form) == 0


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(InputError, match="'ring' is not one of flat, two_tier"):
        algorithm("ring")


def test_idle_ranks_only_announce() -> None:
    idle = np.zeros((0, 4), dtype=np.int64)
    found = traffic([idle] * 4, Topology(2, 2, 1), 1, WIDTH, "bfloat16", algorithm("two_tier"))
    assert found.imbalance == 1 and not found.combine_RR.any()
    assert set(found.dispatch_RR.flat) == {0, ANNOUNCEMENT}
