"""What a card is, from a data file in which every number has its source."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from expertmesh.config.model import fits
from expertmesh.errors import InputError
from expertmesh.planner.facts import fitting, folder, plain, unknown
from expertmesh.planner.parameters import NAMES as PARAMETERS
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.parameters import parameters as fitted

Arithmetic: TypeAlias = Literal["bf16", "fp8", "int8", "fp4", "fp32"]


@dataclass(frozen=True)
class Card:
    """One rank of a cluster: a card, or a die of one that has several.

    memory_gb: capacity, GB (1e9 bytes); memory_gbs: bandwidth of it, GB/s; *_tflops: dense peak, 0 where the hardware
    has none; node_gbs, across_gbs: what a rank sends one way inside a node and to other nodes, GB/s; bulk_gbs: inside
    a node in exchanges of many rows; node_us, across_us: latency of these links. domain_ranks: how many ranks reach
    each other at the speed of a node, which in a rack may be more than a node has. dispatch_us, combine_us: time of an
    exchange without rows; peer_us: of each peer of an exchange in prefill; launch_us: start of a kernel. fp32_tflops: 0
    where float32 is of no account; cache_mb, cache_gbs: size and bandwidth of the last cache before the memory, 0 where
    it holds next to nothing of a model. parameters: of the cost model, by name, where they are known of this card and
    need not be those that were fitted on all.
    sources: of each number.
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
    fp32_tflops: float = 0.0
    cache_mb: float = 0.0
    cache_gbs: float = 0.0
    parameters: Mapping[str, float] = field(repr=False, hash=False, default_factory=dict)
    sources: Mapping[str, str] = field(repr=False, hash=False, default_factory=dict)

    @property
    def ranks_per_node(self) -> int:
        return self.cards_per_node * self.dies_per_card

    @cached_property
    def reached(self) -> Parameters:
        """Of the cost model: what is known of this card, and what was fitted on all."""
        return replace(fitted(), **self.parameters)

    def tflops(self, arithmetic: Arithmetic) -> float:
        """Dense peak; of numbers that the hardware cannot multiply, that of the bfloat16 they are made."""
        return float(getattr(self, f"{arithmetic}_tflops")) or self.bf16_tflops


NUMBERS = tuple(f.name for f in fields(Card) if f.type in (int, float))
OPTIONAL = ("fp32_tflops", "cache_mb", "cache_gbs")
MAKERS = ("nvidia", "amd", "huawei", "instinct")
MAY_BE_ZERO = (
    *OPTIONAL,
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
    """From a file: each number as { value = 64, source = "..." }, those of the cost model in a table [parameters].
    InputError names all that is missing or wrong."""
    table = _table(path)
    title, own = str(table.pop("title", path.stem)), table.pop("parameters", {})
    table.pop("aliases", None)
    own = own if isinstance(own, dict) else {}
    wrong = [f"{name} is no field of a card" for name in table if name not in NUMBERS]
    wrong += [f"{name} is no parameter of the cost model" for name in own if name not in PARAMETERS]
    values: dict[str, Any] = {}
    parameters: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name in (name for name in NUMBERS if name in table or name not in OPTIONAL):
        whole = Card.__dataclass_fields__[name].type is int
        values[name] = _number(name, table.get(name), whole, name in MAY_BE_ZERO, sources, wrong)
    for name in (name for name in own if name in PARAMETERS):
        share = name.endswith("efficiency")  # what is divided by
        parameters[name] = _number(name, own[name], False, not share, sources, wrong)
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    return Card(path.stem, title, **values, parameters=parameters, sources=sources)


def _number(
    name: str, entry: Any, whole: bool, zero: bool, sources: dict[str, str], wrong: list[str]
) -> float:
    """The value of an entry, whose source is noted; or what is wrong is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str) or not entry["source"]:
        wrong.append(f'{name} is not of the form {{ value = 1, source = "..." }}')
        return 0
    value = entry.get("value")
    number = -1.0
    if isinstance(value, int | float) and fits(int if whole else float, value):
        number = float(value)
    if number < 0 or (number == 0 and not zero):
        wrong.append(f"{name} is {value!r}, not a {'count' if whole else 'number'} above 0")
    sources[name] = entry["source"]
    return int(number) if whole else number
