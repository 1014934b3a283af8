"""`python -m tests.kernels.triton.chip`: writes into docs/accelerators.md what the compilers say of every kernel at
DeepSeek-V3's sizes, and what its launches cost. A test compares."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from expertmesh.kernels.triton.tiles import ASCEND, CUDA
from tests.kernels.triton import costs, toolchain

DOCUMENT = toolchain.ROOT / "docs" / "accelerators.md"
MEMORIES = ("UB", "L1", "L0C")
Lines = Sequence[dict[str, Any]]


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    return "\n".join((row(["kernel", *heads]), row(["---"] * (len(heads) + 1)), *rows))


def by_kernel(
    lines: Lines, targets: Sequence[str], cells: Callable[[dict[str, Any]], list[str]]
) -> Iterator[str]:
    """A row of each example, with its cells for each target that it is for."""
    found = {(line["example"], line["target"]): cells(line) for line in lines}
    width = len(next(iter(found.values())))
    for example in dict.fromkeys(line["example"] for line in lines):
        kernel, _, name = example.partition("-")
        every = [found.get((example, target), ["-"] * width) for target in targets]
        yield row([f"`{kernel}` {name}", *(cell for some in every for cell in some)])


def ascend(found: Callable[[str], Lines]) -> str:
    """Bytes of each memory of a core, and how many signals matrix and vector part exchange."""

    def cells(line: dict[str, Any]) -> list[str]:
        alone = "Vector" if set(line["bytes"]) == {"UB"} else "Cube"
        parts = f"Cube + Vector, {line['signals']}" if len(line["parts"]) == 2 else alone
        return [*(f"{line['bytes'].get(memory, 0):,}" for memory in MEMORIES), parts]

    heads = [f"{target} {name}" for target in ASCEND for name in (*MEMORIES, "parts, signals")]
    return table(heads, by_kernel(found("bishengir"), ASCEND, cells))


def cuda(found: Callable[[str], Lines]) -> str:
    """Registers of a thread, bytes of shared memory and columns of tensor memory of a program, spilled bytes, and
    instructions of matrix units."""

    def cells(line: dict[str, Any]) -> list[str]:
        tensor = f", {line['tensor_memory']}" if line["tensor_memory"] else ""
        return [f"{line['registers']}, {line['shared']:,}{tensor}", str(line["spilled"]), str(line["matrix"])]

    products = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
    heads = [name for t in CUDA for name in (f"{t} registers, memory", "spilled", products[t])]
    return table(heads, by_kernel(found("cubins"), CUDA, cells))


def launches(found: Callable[[str], Lines]) -> str:
    """The arithmetic of every launch."""
    return "\n".join(("```", *costs.report("ascend-910b", 128, detail=True), "```"))


BLOCKS = {"ascend": ascend, "cuda": cuda, "launches": launches}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- measured: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def written(name: str, text: str) -> str:
    """What the document has."""
    match = block(name).search(text)
    assert match is not None, f"{DOCUMENT} has no block {name}"
    return match[2].removesuffix("\n")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, made in BLOCKS.items():
        new = made(toolchain.found)
        text = block(name).sub(lambda match, new=new: f"{match[1]}{new}\n{match[3]}", text)  # type: ignore[misc]
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
