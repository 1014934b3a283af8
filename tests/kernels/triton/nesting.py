"""The loops of a program in MLIR's text, and in them what one asks for."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Block(Generic[T]):
    """turns: how often it is run; 0 of a condition's."""

    turns: int = 1
    inside: list["Block[T] | T"] = field(default_factory=list)

    def run(self) -> Iterator[T]:
        """What is in it, in the order in which it is met."""
        for _ in range(self.turns):
            for item in self.inside:
                if isinstance(item, Block):
                    yield from item.run()
                else:
                    yield item


def nested(body: str, asked: Callable[[str], T | None], unknown: int) -> Block[T]:
    """asked: what a line has of it. unknown: turns of loops whose bounds are not constants. ValueError where a
    condition decides about something that is asked for."""
    named = re.findall(r"(%\w+) = arith\.constant (-?\d+) : (?:i\d+|index)", body)
    constants = {name: int(value) for name, value in named}
    stack: list[Block[T]] = [Block()]
    for line in body.splitlines():
        text = re.sub(r" loc\(.*", "", line).strip()
        if text.startswith("}") and len(stack) > 1:
            if unrolled := re.search(r"multibuffer_unroll_factor = (\d+)", text):
                stack[-1].turns = int(unrolled[1])
            block = stack.pop()
            if block.inside and not block.turns:
                raise ValueError(f"a condition decides about {block.inside[0]}")
            if block.inside:
                stack[-1].inside.append(block)
        if (item := asked(text)) is not None:
            stack[-1].inside.append(item)
        elif text.endswith(("{", "({")):
            stack.append(Block(turns=_turns(text, constants, unknown)))
    return stack[0]


def _turns(line: str, constants: dict[str, int], unknown: int) -> int:
    if not (bounds := re.search(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)", line)):
        return 0 if "scf.if" in line or "else" in line else 1
    if not all(name in constants for name in bounds.groups()):
        return unknown
    first, last, step = (constants[name] for name in bounds.groups())
    return len(range(first, last, step))
