"""How much is examined: the sizes of ops, and how often and how long things are measured."""

from dataclasses import dataclass, replace
from typing import Any

from expertmesh.bench.ops import AttentionSizes


@dataclass(frozen=True)
class Shape(AttentionSizes):
    """A model's sizes as one card has them. experts: of a layer; slots: those of them that the card holds."""

    inner: int
    experts: int
    slots: int
    choices: int
    groups: int
    vocabulary: int


@dataclass(frozen=True)
class Batch:
    """Rows of a step. sequences: (known tokens, rows of this step) of each, those of one row first."""

    name: str
    sequences: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.sequences)


@dataclass(frozen=True)
class Sizes:
    """models: shapes with the batches of each. precisions: by the name of a shape. memory: bytes that are copied and
    read; product: rows, outputs and inputs of the products that the peak is measured with; rounds: of a measurement;
    repeats: runs of an op with one input; seconds: that these take at most; messages: bytes that a card sends to each
    other one; tokens: of each prompt; limit: seconds after which what does not answer hangs."""

    models: tuple[tuple[Shape, tuple[Batch, ...]], ...]
    precisions: dict[str, tuple[str, ...]]
    memory: int = 1 << 30
    product: tuple[int, int, int] = (4096, 4096, 4096)
    rounds: int = 50
    repeats: int = 200
    seconds: float = 5.0
    messages: tuple[int, int] = (64, 16 << 20)
    tokens: int = 24
    limit: float = 600.0

    @staticmethod
    def of(plain: dict[str, Any]) -> "Sizes":
        """From `dataclasses.asdict`, as messages have it."""
        models = tuple(
            (Shape(**shape), tuple(Batch(b["name"], tuple(map(tuple, b["sequences"]))) for b in batches))
            for shape, batches in plain["models"]
        )
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
        }
        given["models"] = models
        given["precisions"] = {name: tuple(value) for name, value in plain["precisions"].items()}
        return Sizes(**given)


RAGGED = Shape("ragged", 40, 3, 20, 16, 8, 12, 10, 24, 16, 5, 3, 4, 50)
# A card of 8 that share the heads, and of 32 that share the experts.
V3 = Shape("DeepSeek-V3", 7168, 16, 1536, 512, 64, 128, 128, 2048, 256, 8, 8, 8, 129280 // 8)
# Of one page and of several, whatever kernels have: the last token is the first of a page, or the last.
MIXED = Batch("decoding and prompts", ((1, 1), (37, 1), (128, 1), (257, 1), (9, 9), (140, 7)))
ONE = Batch("one row", ((6, 1),))
DECODE = Batch("64 decode at 1,024", ((1024, 1),) * 64)
PREFILL = Batch("a prompt of 512", ((512, 512),))
CARD = Sizes(
    ((RAGGED, (ONE, MIXED)), (V3, (DECODE, PREFILL))),
    {RAGGED.name: ("float32", "bfloat16", "w8a8"), V3.name: ("bfloat16", "w8a8", "fp8")},
)
# Less of it for a processor, which is slower by a hundred times.
CPU = replace(
    CARD,
    models=(
        CARD.models[0],
        (
            replace(V3, slots=2),
            (Batch("4 decode at 512", ((512, 1),) * 4), Batch("a prompt of 128", ((128, 128),))),
        ),
    ),
    memory=1 << 27,
    product=(256, 2048, 2048),
    rounds=10,
    seconds=0.2,
)
