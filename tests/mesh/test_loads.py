"""Loads that can be planned for, and those that cannot."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, Topology
from expertmesh.mesh.loads import Loads, check_fit, join

COUNTS = np.array([[[0, 0, 0], [1, 2, 3], [4, 0, 0]], [[0, 0, 0], [0, 0, 0], [1, 1, 1]]])


def test_dense_layers_are_left_out() -> None:
    loads = Loads.of(COUNTS)
    assert (loads.layers, loads.rows, loads.experts) == ((1, 2), 3, 3)
    assert loads.counts_WLE.tolist() == COUNTS[:, 1:].tolist() and loads.counts_WLE.dtype == np.int64
    assert loads.weights_W.tolist() == [1, 1]


def test_windows_without_load_are_left_out_with_their_weight() -> None:
    loads = Loads.of(np.stack([COUNTS[0], COUNTS[0] * 0, COUNTS[1]]), [1, 2, 3])
    assert loads.weights_W.tolist() == [1, 3]
    assert loads.total_LE.tolist() == [[1, 2, 3], [7, 3, 3]]


def test_totals_of_rows() -> None:
    loads = Loads.of(COUNTS)
    assert loads.total_of([0, 2, 5]).tolist() == [[0, 0, 0], [5, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, np.float16, np.float32, np.float64])
def test_types_of_numbers(dtype: type) -> None:
    counts = Loads.of(np.array([[1, 2]], dtype=dtype)).counts_WLE
    assert counts.dtype in (np.int64, np.float64) and counts.tolist() == [[[1, 2]]]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([[1, -2]]), "-2 at layer 0, expert 1 is negative"),
        (np.array([[1, np.nan]]), "nan at layer 0, expert 1 is not a finite number"),
        (np.array([[[1.0], [2]], [[3], [np.inf]]]), "inf at layer 1, expert 0 of window 1"),
        (np.array([[1e308, 1e308]]), "is too large; loads are from 0 to 1e+15"),
        (np.zeros((2, 3)), "all are zero"),
        (np.zeros((0, 3)), "shape [1, 0, 3] is not [layers, experts]"),
        (np.array([1, 2]), "shape [2] is not [layers, experts]"),
        (np.ones((1, 1, 1, 1)), "shape [1, 1, 1, 1] is not"),
        (np.array([[True]]), "no plain numbers"),
        (np.array([["1"]]), "no plain numbers"),
        (np.array([[1j]]), "no plain numbers"),
        (np.array([[None]]), "no plain numbers"),
    ],
)
def test_wrong_loads(counts: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Loads.of(counts)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, np.nan]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(InputError, match="weights"):
        Loads.of(COUNTS, weights)


def test_groups_divide_the_experts() -> None:
    assert Loads.of(COUNTS, groups=3).groups == 3
    with pytest.raises(InputError, match="3 experts do not divide into 2 groups"):
        Loads.of(COUNTS, groups=2)


def test_layers_are_numbered_as_many_as_there_are() -> None:
    for layers in ((0,), (1, 1), (-1, 0)):
        with pytest.raises(InputError, match="do not name the rows of 2 layers"):
            Loads(COUNTS[:, 1:], np.ones(2), layers)
    with pytest.raises(InputError, match="layer 7 is not among 3 rows"):
        Loads(COUNTS[:, 1:], np.ones(2), (1, 7), rows=3)


def test_a_record_of_tokens_is_counted() -> None:
    tokens_LTK = np.array([[[-1, -1]] * 3, [[0, 2], [2, 1], [2, -1]]])
    loads = Loads.of_tokens(tokens_LTK, 4)
    assert loads.layers == (1,) and loads.counts_WLE.tolist() == [[[1, 1, 3, 0]]]
    assert loads.tokens_LTK is not None and loads.tokens_LTK.tolist() == tokens_LTK[1:].tolist()
    assert Loads.of_tokens(tokens_LTK).experts == 3


@pytest.mark.parametrize("tokens", [np.array([[[3]]]), np.array([[[-2]]])])
def test_a_record_of_other_experts(tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match="not from 0 to 2"):
        Loads.of_tokens(tokens, 3)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32))
def test_merged_windows_keep_the_total(most: int, windows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    loads = Loads.of(generator.integers(1, 9, (windows, 2, 3)), generator.uniform(0.5, 2, windows))
    merged = loads.merged(most)
    assert len(merged.weights_W) == min(most, windows)
    np.testing.assert_allclose(merged.total_LE, loads.total_LE)


def test_parts_are_windows_of_one() -> None:
    first = Loads.of_tokens(np.array([[[-1], [-1]], [[0], [1]], [[1], [1]]]), 3)
    second = Loads.of(COUNTS)
    loads = join([first, second], [2, 0.5])
    assert loads.layers == (1, 2) and loads.weights_W.tolist() == [2, 0.5, 0.5]
    np.testing.assert_allclose(loads.total_LE, 2 * first.total_LE + 0.5 * second.total_LE)
    assert loads.tokens_LTK is not None and loads.tokens_LTK.tolist() == [[[0], [1]], [[1], [1]]]


def test_layers_that_only_one_part_has() -> None:
    tokens = np.array([[[0, 1]], [[-1, -1]]])
    loads = join([Loads.of_tokens(tokens, 2), Loads.of(np.array([[0, 0], [1, 1]]))])
    assert loads.layers == (0, 1) and loads.counts_WLE.tolist() == [[[1, 1], [0, 0]], [[0, 0], [1, 1]]]
    assert loads.tokens_LTK is not None and loads.tokens_LTK.tolist() == tokens.tolist()


@pytest.mark.parametrize("shape", [(2, 3), (3, 4)])
def test_parts_of_different_models(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="window 1 has"):
        join([Loads.of(COUNTS), Loads.of(np.ones(shape))])


def test_what_a_cluster_can_hold() -> None:
    loads = Loads.of(COUNTS)
    check_fit(loads, Topology(2, 2), 9)
    with pytest.raises(InputError, match="200000 cards; experts are placed on 4096 at most"):
        check_fit(loads, Topology(100_000, 2), 0)
    for redundant, message in ((10, "can use 9 at most"), (-1, "at least 0")):
        with pytest.raises(InputError, match=message):
            check_fit(loads, Topology(2, 2), redundant)


def test_a_layer_without_load_is_none() -> None:
    with pytest.raises(InputError, match="layer 0 has none; leave it out"):
        Loads(COUNTS, np.ones(2), (0, 1, 2))
