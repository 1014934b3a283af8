"""Pictures of plans: what is drawn is where its number says."""

import re
from html.parser import HTMLParser

import pytest

from expertmesh.planner.svg import Dot, Piece, bars, scatter


class Shapes(HTMLParser):
    """Attributes of every element, by its tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: dict[str, list[dict[str, str]]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.setdefault(tag, []).append({name: value or "" for name, value in attrs})


def test_points_lie_where_their_numbers_are() -> None:
    dots = [Dot(10, 100, "a"), Dot(100, 200, "b<&", True), Dot(1000, 300, "c")]
    text = scatter("Title", "ms", "tokens", dots, "front")
    found = Shapes(text).all["circle"]
    x, y = ([float(circle[name]) for circle in found] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # logarithmic
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2) and y[0] > y[2]
    assert [circle["class"] for circle in found] == ["dot", "chosen", "dot"]
    assert "b&lt;&amp;" in text and re.search(">1000</text>", text) and re.search(">200</text>", text)


@pytest.mark.parametrize(("x", "y"), [(5.0, 0.01), (0.2, 1e6)])
def test_one_point_has_axes_too(x: float, y: float) -> None:
    text = scatter("Title", "ms", "tokens", [Dot(x, y, "")], "front")
    assert "nan" not in text and text.count("<text") >= 4


def test_bars_have_the_lengths_of_their_numbers() -> None:
    rows = [
        ("one", [Piece("a", 1, "c0", "a"), Piece("b", 3, "c1", "b")]),
        ("two", [Piece("c", -1, "free", "c")]),
    ]
    found = Shapes(bars("Title", rows, 4, "bars")).all["rect"]
    widths = [float(rect["width"]) for rect in found]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2) and widths[2] == 0
    assert float(found[1]["x"]) == pytest.approx(float(found[0]["x"]) + widths[0], abs=0.2)
