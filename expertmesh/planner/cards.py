"""What a card is, from a data file in which every number has its source."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from expertmesh.config.model import fits
from expertmesh.errors import InputError
from expertmesh.planner.facts import fitting, folder, plain, unknown

Arithmetic: TypeAlias = Literal["bf16", "fp8", "int8", "fp4"]


@dataclass(frozen=True)
class Card:
    """One rank of a cluster: a card, or a die of one that has several.

    memory_gb: capacity, GB (1e9 bytes); memory_gbs: bandwidth of it, GB/s; *_tflops: dense peak, 0 where the hardware
    has none; node_gbs, across_gbs: what a rank sends one way inside a node and to other nodes, GB/s; bulk_gbs: inside
    a node in exchanges of many rows; node_us, across_us: latency of these links. domain_ranks: how many ranks reach
    each other at the speed of a node, which in a rack may be more than a node has. dispatch_us, combine_us: time of an
    exchange without rows; peer_us: of each peer of an exchange in prefill; launch_us: start of a kernel. sources: of
    each number.
    """

    name: str
    title: str
    memory_gb: float
    memory_gbs: float
    bf16_tflops: float
    fp8_tflops: float
    int8_tflops: float
    fp4_tflops: float
    node_gbs: float
    node_us: float
    bulk_gbs: float
    across_gbs: float
    across_us: float
    cards_per_node: int
    dies_per_card: int
    domain_ranks: int
    dispatch_us: float
    combine_us: float
    peer_us: float
    launch_us: float
    sources: Mapping[str, str] = field(repr=False, hash=False, default_factory=dict)

    @property
    def ranks_per_node(self) -> int:
        return self.cards_per_node * self.dies_per_card

    def tflops(self, arithmetic: Arithmetic) -> float:
        """Dense peak; of numbers that the hardware cannot multiply, that of the bfloat16 they are made."""
        return float(getattr(self, f"{arithmetic}_tflops")) or self.bf16_tflops


NUMBERS = tuple(f.name for f in fields(Card) if f.type in (int, float))
MAKERS = ("nvidia", "amd", "huawei", "instinct")
MAY_BE_ZERO = (
    "fp8_tflops",
    "int8_tflops",
    "fp4_tflops",
    "node_us",
    "across_us",
    "dispatch_us",
    "combine_us",
    "peer_us",
)


def known_cards() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in folder("cards").glob("*.toml")))


def card(name: str) -> Card:
    """A card by its name, one of its other names, or the path of a file of one's own (*.toml).

    InputError with the nearest names where there is none, or with what is wrong with the file.
    """
    if name.endswith(".toml"):
        return read_card(Path(name))
    files = {path.stem: path for path in folder("cards").glob("*.toml")}
    aliases = {alias: path for path in files.values() for alias in _table(path).get("aliases", ())}
    words = [word for word in plain(name).split("-") if word not in MAKERS]
    found = fitting("-".join(words), [*files, *aliases])
    if found is None:
        raise unknown("card", name, files)
    return read_card((files | aliases)[found])


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the name of a known card, or a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error})") from None


def read_card(path: Path) -> Card:
    """From a file: each number as { value = 64, source = "..." }. InputError names all that is missing or wrong."""
    table = _table(path)
    wrong: list[str] = []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in NUMBERS:
        entry = table.pop(name, None)
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str) or not entry["source"]:
            wrong.append(f'{name} is not of the form {{ value = 1, source = "..." }}')
            continue
        value = entry.get("value")
        whole = Card.__dataclass_fields__[name].type is int
        number = (
            float(value) if isinstance(value, int | float) and fits(int if whole else float, value) else -1.0
        )
        if number < 0 or (number == 0 and name not in MAY_BE_ZERO):
            wrong.append(f"{name} is {value!r}, not a {'count' if whole else 'number'} above 0")
            continue
        values[name], sources[name] = int(number) if whole else number, entry["source"]
    title = table.pop("title", path.stem)
    table.pop("aliases", None)
    wrong += [f"{name} is no field of a card" for name in table]
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    return Card(name=path.stem, title=str(title), **values, sources=sources)
