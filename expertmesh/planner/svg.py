"""Small pictures as SVG inside of a page: points over two axes, and bars. Colours are classes of the page's style."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, LEFT, LINE = 760, 150, 24


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    text: str
    chosen: bool = False


@dataclass(frozen=True)
class Piece:
    """Of a bar. size: in the bar's unit; kind: class of its colour."""

    name: str
    size: float
    kind: str
    text: str


def _open(height: float, title: str, name: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}">'
        f'<title id="{name}">{escape(title)}</title>'
    )


def scatter(title: str, across: str, up: str, dots: Sequence[Dot], name: str) -> str:
    """Points joined by a line. The axis across is logarithmic, the one up begins at 0."""
    height, bottom, top, left, right = 380, 330, 16, 70, WIDTH - 20
    low, high = min(d.x for d in dots) / 1.15, max(d.x for d in dots) * 1.15
    most = max(d.y for d in dots) * 1.08

    def x(value: float) -> float:
        return left + (log10(value) - log10(low)) / (log10(high) - log10(low)) * (right - left)

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top)

    parts = [_open(height, title, name)]
    for tick in _ticks(most):
        parts.append(
            f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/>'
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _log_ticks(low, high):
        parts.append(
            f'<path class="grid" d="M{x(tick):.1f} {top}V{bottom}"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
        )
    line = " ".join(f"{x(d.x):.1f},{y(d.y):.1f}" for d in dots)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for d in dots:
        kind, radius = ("chosen", 8) if d.chosen else ("dot", 5)
        parts.append(
            f'<circle class="{kind}" cx="{x(d.x):.1f}" cy="{y(d.y):.1f}" r="{radius}">'
            f"<title>{escape(d.text)}</title></circle>"
        )
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">{escape(across)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text></svg>'
    )
    return "".join(parts)


def bars(title: str, rows: Sequence[tuple[str, Sequence[Piece]]], most: float, name: str) -> str:
    """A bar of pieces for each row, all of one scale."""
    height = LINE * len(rows) + 8
    scale = (WIDTH - LEFT - 70) / most
    parts = [_open(height, title, name)]
    for i, (label, pieces) in enumerate(rows):
        y, at = i * LINE + 4, float(LEFT)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        for piece in pieces:
            width = max(piece.size, 0.0) * scale
            parts.append(
                f'<rect class="{escape(piece.kind)}" x="{at:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 6}">'
                f"<title>{escape(piece.text)}</title></rect>"
            )
            at += width
        total = sum(max(piece.size, 0.0) for piece in pieces)
        parts.append(f'<text x="{at + 6:.1f}" y="{y + 15}">{total:.3g}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(most: float) -> list[float]:
    step = 10 ** floor(log10(most))
    step = step / 5 if most / step < 2 else step / 2 if most / step < 5 else step
    return [i * step for i in range(int(most / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    return [t for d in decades for t in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if low <= t <= high]
