"""Figures of placements, and the pictures of them."""

import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import Topology
from expertmesh.balancer.figures import Figures, node_traffic, replicas_on
from expertmesh.balancer.plot import Map, page, png
from expertmesh.mesh.placement import Placement, default_placement
from tests.support.cluster import placements, topologies


def test_figures_of_layers() -> None:
    figures = Figures.of(np.array([[1.0, 3, 2, 2], [0, 0, 0, 0], [4, 0, 4, 4]]))
    np.testing.assert_allclose(figures.max_over_mean_L, [1.5, 4 / 3])
    np.testing.assert_allclose(figures.spread_L, [1, 4 / 3])
    assert figures.means() == pytest.approx({"mean_max_over_mean": 17 / 12, "mean_spread": 7 / 6})


def test_traffic_without_replicas_goes_to_the_experts() -> None:
    topology = Topology(2, 2)
    placement = default_placement(4, [0, 1], topology)
    counts_LE = np.array([[1.0, 2, 3, 2], [5, 0, 3, 0]])
    # Node 0 has 1 + 2 + 5 of 16 rows; half of the tokens start on each node.
    np.testing.assert_allclose(node_traffic(placement, counts_LE, topology), [[0.25, 0.25], [0.25, 0.25]])


def test_replicas_on_every_node_keep_rows_at_home() -> None:
    topology = Topology(2, 1)
    placement = Placement(np.array([[[0, 1], [1, 0]]]), 2, (0,))
    np.testing.assert_allclose(node_traffic(placement, np.array([[3.0, 5]]), topology), [[0.5, 0], [0, 0.5]])


@given(topologies(), st.integers(1, 12), st.data())
def test_traffic_is_what_starts_on_a_node_and_what_its_slots_serve(
    topology: Topology, experts: int, data: st.DataObject
) -> None:
    placement = data.draw(placements(topology, experts))
    counts_LE = np.random.default_rng(experts).uniform(0.1, 9, (1, experts))
    traffic = node_traffic(placement, counts_LE, topology)
    assert traffic.min() >= 0
    np.testing.assert_allclose(traffic.sum(1), 1 / topology.nodes)
    replicas_EN = replicas_on(placement.slots_LRS, experts, topology.nodes)[0]
    shares_EN = replicas_EN / replicas_EN.sum(1, keepdims=True)
    np.testing.assert_allclose(traffic.sum(0), counts_LE[0] @ shares_EN / counts_LE.sum())


def a_map(rows: int = 3, columns: int = 5, middle: float = 1) -> Map:
    values = np.linspace(0, 3, rows * columns).reshape(rows, columns)
    return Map("Loads: 100%", values, ("layer", range(3, 3 + rows)), ("card", range(columns)), middle, 2)


def decoded(data: bytes) -> np.ndarray:
    """[height, width, 3], after the PNG specification; checksums too."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length]) == (
            zlib.crc32(kind + body),
        )
        chunks[kind] = body
        place += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest, list(chunks)) == (8, 2, [0, 0, 0], [b"IHDR", b"IDAT", b"IEND"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_a_png_has_the_colours_of_the_values() -> None:
    one = a_map()
    pixels = {tuple(p) for p in decoded(png([one])).reshape(-1, 3).tolist()}
    assert {tuple(p) for p in one.colours(one.values).reshape(-1, 3).tolist()} <= pixels


def test_several_maps_in_one_png() -> None:
    shape = decoded(png([a_map()] * 3)).shape
    assert shape[0] > shape[1] / 2 and decoded(png([a_map(60, 64), a_map(8, 8, 0)])).shape[1] > 600


def test_colours_go_from_blue_over_white_to_red() -> None:
    blue, white, red = (0x21, 0x66, 0xAC), (0xF7, 0xF7, 0xF7), (0xB2, 0x18, 0x2B)
    assert a_map().colours(np.array([0, 1, 2, 9.0])).tolist() == [list(c) for c in (blue, white, red, red)]
    assert a_map(middle=0).colours(np.array([0, 2.0])).tolist() == [list(white), list(red)]


@pytest.mark.parametrize("columns", [5, 40])
def test_a_page_needs_nothing_else(columns: int) -> None:
    text = page("Balance", ["a < b"], [a_map(3, columns)])
    cells, links = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            links.extend(value for name, value in attributes if name in ("src", "href"))
            if tag == "td":
                cells.append(given["title"])

    Reader().feed(text)
    assert len(cells) == 3 * columns and cells[0] == "layer 3, card 0: 0.00"
    assert not links and "<script" not in text and "http" not in text and "a &lt; b" in text
