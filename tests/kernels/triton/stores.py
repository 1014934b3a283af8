"""How kernels lowered for Ascend write. A store whose mask has gaps becomes one that reads its whole block, puts
numbers in and writes all of it again: what another core has written there meanwhile is lost, and memory beyond a
tensor's end is written. A mask that leaves out the end of a block does no harm."""

import re
from collections.abc import Iterator
from typing import Any

from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import ASCEND, CPU
from tests.kernels.triton.ascend import linalg
from tests.kernels.triton.example import Example, Maker


def written_again(lowered: str) -> list[str]:
    """Stores into blocks that were read just before. Names are used again in other regions, so that what counts is the
    place where one was last given to a block."""
    blocks: dict[str, int] = {}
    read: set[tuple[str, int | None]] = set()
    found = []
    for number, line in enumerate(lowered.splitlines()):
        if made := re.match(r"\s*(%\w+) = memref\.reinterpret_cast", line):
            blocks[made[1]] = number
        elif copied := re.match(r"\s*memref\.copy (%\w+),", line):
            read.add((copied[1], blocks.get(copied[1])))
        stored = re.search(r"materialize_in_destination %\w+ in writable (%\w+)", line)
        if stored and stored[1] in blocks and (stored[1], blocks[stored[1]]) in read:
            found.append(line.strip())
    return found


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    """At sizes that do not divide into tiles, where masks matter."""
    for example in examples:
        if not example.full and ASCEND[0] in example.targets:
            kernel = KERNELS[example.kernel]
            every = kernel.complete(example.arguments(Maker("meta")), CPU)
            lowered = linalg(kernel, every, ASCEND[0])
            stores = lowered.count("materialize_in_destination")
            yield {"example": str(example), "stores": stores, "again": written_again(lowered)}
