"""How the weights of products are kept: as they are computed, or quantised. No torch."""

from dataclasses import dataclass
from typing import Literal

from expertmesh.errors import InputError

# Outputs that kernels keep side by side, and bytes of each at a time (`native/cpu/product.h`).
LANES, CHUNK_BYTES = 16, 64


@dataclass(frozen=True)
class Format:
    """How numbers are kept. code: of `native/cpu/product.h`; per_chunk: numbers in a chunk of an output; group: how
    many numbers of an output share a scale of scale_bytes, 0 for all of them."""

    name: str
    code: int
    per_chunk: int
    group: int | None = None
    scale_bytes: int = 4

    def part_bytes(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Of the numbers of a matrix, of their scales, and of the sums that products of whole numbers need."""
        blocks, chunks = -(-rows // LANES), -(-columns // self.per_chunk)
        numbers = blocks * chunks * LANES * CHUNK_BYTES
        if self.group is None:
            return numbers, 0, 0
        if self.group == 0:
            return numbers, blocks * LANES * 4, blocks * LANES * 4
        return numbers, blocks * -(-columns // self.group) * LANES * self.scale_bytes, 0


# What is not quantised: the type that is computed in.
PLAIN = Format("plain", 0, 32)
# Whole numbers of 8 bits, with a scale for each output; rows are quantised too, with a scale for each (W8A8).
W8A8 = Format("w8a8", 1, 64, 0)
# Weights alone, which are made bfloat16 where they are used: whole numbers, or FP8 as the checkpoint has it.
INT8, INT4, FP8 = Format("int8", 2, 64, 128), Format("int4", 3, 128, 128), Format("fp8", 4, 64, 128)

MatrixKind = Literal["linear", "prologue", "experts", "head"]


@dataclass(frozen=True)
class Precision:
    """Formats of a model's matrices. experts: the routed ones; linear: all others but the head, the router and the
    up-projection of the latents, which are never quantised; prologue: of these the projections before attention, where
    kernels keep them in another format."""

    linear: Format = PLAIN
    experts: Format = PLAIN
    prologue: Format | None = None

    @staticmethod
    def of(quantise: str) -> "Precision":
        if quantise not in PRECISIONS:
            raise InputError(f"quantise {quantise!r} is not one of {', '.join(PRECISIONS)}")
        return PRECISIONS[quantise]

    def format(self, kind: MatrixKind, columns: int, cut: bool) -> Format:
        """cut: these columns are a TP rank's share. One that begins inside of an FP8 block is not kept as FP8."""
        prologue = self.linear if self.prologue is None else self.prologue
        found = {"linear": self.linear, "prologue": prologue, "experts": self.experts, "head": PLAIN}[kind]
        return PLAIN if found.name == FP8.name and cut and columns % 128 else found


PRECISIONS = {
    "none": Precision(),
    "w8a8": Precision(W8A8, W8A8),
    "experts_int8": Precision(experts=INT8),
    "experts_int4": Precision(experts=INT4),
    "fp8": Precision(FP8, FP8),
}
