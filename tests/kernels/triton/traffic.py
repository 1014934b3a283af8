"""What one program of a kernel moves and computes, read off its compiled form."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.kernels.triton.nesting import nested

WIDTHS = {"bf16": 2, "f16": 2, "f32": 4, "i64": 8, "i32": 4, "i8": 1, "f8E4M3FN": 1}


@dataclass(frozen=True)
class Traffic:
    """Bytes loaded and stored, and operations of matrix products."""

    loaded: int
    stored: int
    flops: int


def sizes(shape: str) -> tuple[int, str]:
    """64x32xbf16 or bf16 -> how many numbers, and of which kind."""
    *sides, kind = shape.split("x")
    count = 1
    for side in sides:
        count *= int(side)
    return count, kind


def traffic(ttir: str, unknown: int = 1) -> Traffic:
    """Of a kernel in Triton's IR; masked numbers count. unknown: turns of loops whose bounds are not constants."""
    return Traffic(
        *(sum(nested(ttir, of, unknown).run()) for of in (_moved("tt.load "), _moved("tt.store "), _computed))
    )


def _moved(operation: str) -> Callable[[str], int | None]:
    def bytes_of(line: str) -> int | None:
        if operation not in line:
            return None
        found = re.search(r": (?:tensor<([\dx]*))?!tt\.ptr<(\w+)>", line)
        assert found is not None, line
        count, kind = sizes((found[1] or "") + found[2])
        return count * WIDTHS[kind]

    return bytes_of


def _computed(line: str) -> int | None:
    if not (found := re.search(r"tt\.dot .* : tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>", line)):
        return None
    return 2 * int(found[1]) * int(found[2]) * int(found[3])
