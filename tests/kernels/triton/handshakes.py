"""Whether the matrix and the vector part of a kernel wait for each other as often as they signal: both are run step by
step, with nothing in them but their signals."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

from tests.kernels.triton.nesting import nested

# Turns of a loop whose bounds are not constants: both parts have it.
TURNS = 3
# "set" or "wait", and a flag.
Signal: TypeAlias = tuple[str, str]


def signals(body: str) -> Iterator[Signal]:
    """Of one part, in order. Flags that a buffer's number chooses are one semaphore together with those that they are
    chosen from, which are those of the same pipe."""
    chosen = set(re.findall(r"sync_block_(?:set|wait)\[<\w+>, (<\w+>), <\w+>\] flag = %", body))

    def signal(line: str) -> Signal | None:
        if not (found := re.search(r"sync_block_(set|wait)\[<\w+>, (<\w+>), <\w+>\] flag = (\S+)", line)):
            return None
        kind, pipe, flag = found.groups()
        return kind, pipe if pipe in chosen else flag

    return nested(body, signal, TURNS).run()


def mismatch(matrix: str, vector: str) -> str:
    """What is wrong between two parts: empty if both come to their end, with every signal waited for once."""
    parts = [signals(matrix), signals(vector)]
    raised: list[Counter[str]] = [Counter(), Counter()]  # by each part
    now = [next(part, None) for part in parts]
    moved = True
    while moved:
        moved = False
        for i, part in enumerate(parts):
            while (step := now[i]) is not None and (step[0] == "set" or raised[1 - i][step[1]]):
                if step[0] == "set":
                    raised[i][step[1]] += 1
                else:
                    raised[1 - i][step[1]] -= 1
                now[i], moved = next(part, None), True
    if any(now):
        return f"they wait for each other: {now}"
    left = [{flag: count for flag, count in c.items() if count} for c in raised]
    return f"signals that nobody waits for: {left}" if any(left) else ""
