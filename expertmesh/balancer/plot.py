"""Heat maps as a PNG or as a page of HTML that needs nothing else."""

import html
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertmesh.mesh.loads import Floats

Pixels: TypeAlias = NDArray[np.uint8]

BLUE, WHITE, RED = (0x21, 0x66, 0xAC), (0xF7, 0xF7, 0xF7), (0xB2, 0x18, 0x2B)
SCALE, MARGIN = 2, 24  # pixels of a dot of the letters; around the maps
LINE = 10 * SCALE
# Letters of 5 x 7 dots: two hexadecimal digits for each row of each.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:%-/"
DOTS = (
    "0E11111F111111 1E11111E11111E 0E11101010110E 1E11111111111E 1F10101E10101F 1F10101E101010 0E11101711110F "
    "1111111F111111 0E04040404040E 0702020202120C 11121418141211 1010101010101F 111B1515111111 11111915131111 "
    "0E11111111110E 1E11111E101010 0E11111115120D 1E11111E141211 0F10100E01011E 1F040404040404 1111111111110E "
    "11111111110A04 1111111515150A 11110A040A1111 11110A04040404 1F01020408101F 0E11131519110E 040C040404040E "
    "0E11010204081F 1F02040201110E 02060A121F0202 1F101E0101110E 0608101E11110E 1F010204080808 0E11110E11110E "
    "0E11110F01020C 00000000000C0C 000000000C0408 000C0C000C0C00 18190204081303 0000001F000000 00010204081000 "
)


@dataclass(frozen=True, eq=False)
class Map:
    """A heat map. values: [rows, columns]; rows, columns: the name of each; middle and top: the values that are white
    and red, 0 is blue; unit: said after a value. middle 0 makes a scale of white and red only."""

    title: str
    values: Floats
    rows: tuple[str, Sequence[int]]
    columns: tuple[str, Sequence[int]]
    middle: float
    top: float
    unit: str = ""

    def colours(self, values: Floats) -> Pixels:
        """[..., 3] of [...]."""
        value = np.clip(values, 0, self.top)[..., None]
        below = value / self.middle if self.middle else np.ones_like(value)
        above = (value - self.middle) / (self.top - self.middle)
        low = np.array(BLUE) + np.minimum(below, 1) * np.subtract(WHITE, BLUE)
        high = np.array(WHITE) + np.maximum(above, 0) * np.subtract(RED, WHITE)
        colours: Pixels = np.where(value < self.middle, low, high).round().astype(np.uint8)
        return colours

    def legend(self) -> str:
        if not self.middle:
            return f"white 0, red {self.top:.3g}{self.unit}"
        return f"blue 0, white {self.middle:g}{self.unit}, red {self.top:.3g}{self.unit} and more"


def png(maps: Sequence[Map], across: int = 2) -> bytes:
    """The maps in rows of `across`."""
    pictures = [_picture(one) for one in maps]
    width = max(picture.shape[1] for picture in pictures)
    strips = []
    for first in range(0, len(pictures), across):
        strip = pictures[first : first + across]
        height = max(picture.shape[0] for picture in strip)
        filled = [_pad(picture, height, width) for picture in strip]
        filled += [_pad(np.full((1, 1, 3), 255, np.uint8), height, width)] * (across - len(strip))
        strips.append(np.concatenate(filled, axis=1))
    return _encode(np.concatenate(strips))


def page(title: str, lines: Sequence[str], maps: Sequence[Map]) -> str:
    """The maps below lines of text in columns. A value is shown when it is pointed at."""
    tables = "\n".join(f"<figure>{_table(one)}</figure>" for one in maps)
    text = html.escape("\n".join(lines))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 14px sans-serif; margin: 2em; }}
pre {{ font-size: 13px; }}
figure {{ display: inline-block; vertical-align: top; margin: 1em; }}
figcaption {{ margin-bottom: .5em; }}
table {{ border-collapse: collapse; font-size: 9px; }}
td {{ min-width: 8px; height: 8px; padding: 0; }}
td.wide {{ min-width: 34px; height: 22px; text-align: center; font-size: 11px; }}
th {{ font-weight: normal; padding: 0 3px; text-align: right; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<pre>{text}</pre>
{tables}
</body></html>
"""


def _table(one: Map) -> str:
    """Few columns have room for the numbers."""
    row_name, rows = one.rows
    column_name, columns = one.columns
    wide = len(columns) <= 16
    colours = one.colours(one.values)
    head = "".join(f"<th>{c if wide or not i % 8 else ''}</th>" for i, c in enumerate(columns))
    body = []
    for r, row in enumerate(rows):
        cells = []
        for c, column in enumerate(columns):
            said = f"{one.values[r, c]:.2f}{one.unit}"
            colour = "#" + bytes(colours[r, c]).hex()
            kind, text = (' class="wide"', said) if wide else ("", "")
            hint = f"{row_name} {row}, {column_name} {column}: {said}"
            cells.append(f'<td{kind} style="background:{colour}" title="{hint}">{text}</td>')
        body.append(f"<tr><th>{row}</th>{''.join(cells)}</tr>")
    caption = html.escape(f"{one.title}: {row_name}s down, {column_name}s across; {one.legend()}")
    return f"<figcaption>{caption}</figcaption><table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _picture(one: Map) -> Pixels:
    """[height, width, 3]: title, map with the ends of its axes, legend."""
    row_name, rows = one.rows
    column_name, columns = one.columns
    cell = max(3, min(48, 640 // max(len(rows), len(columns))))
    cells = np.kron(one.colours(one.values), np.ones((cell, cell, 1), np.uint8))
    high, wide = cells.shape[:2]
    left = MARGIN + _width(str(max(rows))) + 6
    texts = [one.title, f"{row_name}s down, {column_name}s across", one.legend()]
    top = MARGIN + 2 * LINE + LINE // 2
    width = max(left + wide, MARGIN + max(map(_width, texts))) + MARGIN
    out = np.full((top + high + 3 * LINE + MARGIN, width, 3), 255, np.uint8)
    out[top : top + high, left : left + wide] = cells
    for line, text in enumerate(texts[:2]):
        _write(out, text, MARGIN, MARGIN // 2 + line * LINE)
    _write(out, str(rows[0]), MARGIN, top)
    _write(out, str(rows[-1]), MARGIN, max(top + LINE, top + high - LINE))
    _write(out, str(columns[0]), left, top + high + 6)
    _write(out, str(columns[-1]), left + wide - _width(str(columns[-1])), top + high + 6)
    _write(out, texts[2], MARGIN, top + high + 6 + LINE + LINE // 2)
    return out


def _width(text: str) -> int:
    return len(text) * 6 * SCALE


def _write(out: Pixels, text: str, left: int, top: int) -> None:
    """Capital letters; what has none is a gap."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(DOTS), np.uint8)).reshape(-1, 7, 8)[:, :, 3:]
    for place, letter in enumerate(text.upper()):
        if letter not in LETTERS:
            continue
        dots = np.kron(bits[LETTERS.index(letter)], np.ones((SCALE, SCALE), np.uint8)).astype(bool)
        x = left + place * 6 * SCALE
        out[top : top + len(dots), x : x + dots.shape[1]][dots] = 40


def _pad(picture: Pixels, height: int, width: int) -> Pixels:
    rest = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, rest, constant_values=255)


def _encode(pixels: Pixels) -> bytes:
    """PNG (RFC 2083): 8 bits each of red, green and blue, rows without a filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b""))
    )
