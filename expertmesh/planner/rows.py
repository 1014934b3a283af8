"""A published result's row as what is planned: columns of benchmarks/planner/published.csv."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import Card, card
from expertmesh.planner.deployment import Balance, Deployment
from expertmesh.planner.memory import most_requests
from expertmesh.planner.models import model
from expertmesh.planner.serving import CHUNK, Service, Workload, chunk

Row: TypeAlias = Mapping[str, str]
NEEDED = ("model", "hw", "cards", "phase", "weight_prec")
PHASES = ("prefill", "decode", "e2e", "rl-rollout")
MOST_ROWS = (
    512  # of a rank in a step of decoding: the limit of torch_npu's npu_moe_distribute_dispatch_v2 on A3
)
NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Case:
    """phase: of the row. service: what runs; of prefill alone, decode is what prefills. cards: that a result is
    counted over. batch: requests of a TP group, or requests in all where e2e; tokens: of a rank in a step of prefill;
    assumed: what the row does not say."""

    phase: str
    service: Service
    work: Workload | None
    cards: float
    dies: int
    cards_per_node: int
    batch: float = 0.0
    context: float = 0.0
    tokens: float = 0.0
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """instances: of an engine, each with `groups` TP groups of `tp` ranks; experts: EP, None where not said."""

    tp: int
    groups: int
    experts: int | None
    instances: int | None = None

    @property
    def ranks(self) -> int:
        return self.tp * self.groups


def case(row: Row) -> Case:
    """InputError says why a row cannot be answered."""
    missing = [name for name in NEEDED if not row.get(name, "").strip()]
    if missing:
        raise InputError(f"needed fields are blank: {', '.join(missing)}")
    if row["phase"] not in PHASES:
        raise InputError(f"phase {row['phase']!r} is not one of {', '.join(PHASES)}")
    read = {"prefill": _prefill, "e2e": _e2e}.get(row["phase"], _decode)
    return read(row, card(row["hw"]))


def number(text: str | None) -> float | None:
    """The number of a field, None where it holds anything else."""
    found = re.fullmatch(rf"\s*~?{NUMBER}\s*", text or "")
    return float(found[1]) if found else None


def about(text: str | None) -> float | None:
    """The number that a field begins with, of a range the middle; None where it begins with none."""
    found = re.match(rf"\s*(?:~|max)?\s*{NUMBER}(?:\s*-\s*{NUMBER})?(?![\d.]|\s*k?\s*tok)", text or "")
    if not found:
        return None
    return (float(found[1]) + float(found[2])) / 2 if found[2] else float(found[1])


def _count(row: Row, name: str) -> int | None:
    value = number(row.get(name))
    if row.get(name, "").strip() and (value is None or value != int(value) or value < 0):
        raise InputError(f"{name} is {row[name]!r}, not a count")
    return None if value is None else int(value)


def _cards(row: Row) -> int:
    cards = _count(row, "cards")
    if not cards:
        raise InputError(f"cards is {row['cards']!r}, not a count of at least 1")
    return cards


def shape(text: str, ranks: int) -> Shape | None:
    """What a layout's text says: DP32 TP1 EP32, DP144/EP144, 9x(TP8 DP1 EP8), TP16 with DP attention. None where it
    says nothing of these. ranks: of all cards."""
    text = re.sub(
        r"\b([DT])EP\s?(\d+)", r"\1P\2 EP\2", text
    )  # DEP8: attention data parallel, experts over all
    sizes = {
        k.upper(): int(v) for k, v in re.findall(r"(?<![A-Za-z])(TP|DP|EP)\s?(\d+)", text, re.IGNORECASE)
    }
    many = re.search(r"\b(\d+)\s*(?:x|instances)\b\s*x?\s*\(", text)
    instances = int(many[1]) if many else None
    if not sizes:
        return None
    tp, groups, experts = sizes.get("TP", 1), sizes.get("DP"), sizes.get("EP")
    if "DP attention" in text and groups is None:
        tp, groups = 1, tp
        experts = experts or 1
    if groups is None:
        groups = max(1, (experts or tp) // tp)
    elif "TP" not in sizes and experts and experts > groups:
        tp = experts // groups
    if tp * groups > ranks and groups <= tp and tp % groups == 0:  # DP attention inside of TP
        tp //= groups
    return Shape(tp, groups, experts, instances)


def _decode_shape(row: Row, ranks: int) -> Shape:
    """Columns say more than the text."""
    found = shape(row.get("decode_layout", ""), ranks)
    tp, groups, experts = (_count(row, f"{name}_decode") for name in ("tp", "dp", "ep"))
    if found is None and not (tp or groups or experts):
        raise InputError("decode_layout is blank, and so are ep_decode, dp_decode and tp_decode")
    given = found or Shape(1, 1, None)
    experts = experts or given.experts
    tp = tp or given.tp
    groups = groups or (given.groups if found and given.groups > 1 else max(1, (experts or tp) // tp))
    if found and "DP attention" in row.get("decode_layout", ""):
        tp, groups = found.tp, found.groups
    if tp * groups > ranks and tp % groups == 0:
        tp //= groups
    if tp * groups > ranks:
        raise InputError(f"the layout takes {tp * groups} ranks of {ranks}")
    return Shape(tp, groups, experts, given.instances)


def deployment(row: Row, this: Card, found: Shape, phase: str) -> Deployment:
    """One instance of a shape. What a row leaves open is what engines do: rows go out in the weights' 8 bits and come
    back in bfloat16, flat in decoding and in two tiers in prefill; one TP group over all ranks collects instead."""
    precision = row["weight_prec"].strip().lower()
    eight = {"int8": "int8", "w4a8": "int8", "w8a8": "int8", "bf16": None}.get(precision, "fp8")
    whole = found.experts is None or found.experts > 1
    by_expert = whole and (found.experts or found.groups) > 1
    alone = found.groups == 1
    drafts, accepted = _drafts(row) if phase == "decode" else (0, None)
    near = min(found.ranks, this.domain_ranks)
    return Deployment(
        model(row["model"]),
        this,
        _topology(found, near),
        expert_split="expert" if by_expert else "tensor",
        redundant=(_count(row, "redundant") or 0) if by_expert else 0,
        weight_precision=precision,
        cache_precision=_cache(row),
        exchange="collective" if alone else "flat" if phase == "decode" else "two_tier",
        dispatch=eight,
        drafts=drafts,
        accepted=accepted,
        overlap=_overlaps(row.get("overlap", "")),
        balance=_balance(row),
    )


def _topology(found: Shape, near: int) -> Topology:
    """A TP group may cross nodes in published layouts: then nodes are as large as the group, and the card's own domain
    tells which links are slow."""
    per_node = max(near, found.tp)
    while found.ranks % per_node or per_node % found.tp:
        per_node -= 1
    return Topology(found.ranks // per_node, per_node, found.tp)


def _cache(row: Row) -> str:
    found = re.search(r"bf16|fp8|int8", row.get("kv_prec", "").lower())
    if found:
        return found[0]
    return "fp8" if row["weight_prec"].strip().lower() in ("fp4", "nvfp4") else "bf16"


def _overlaps(text: str) -> bool:
    return bool(re.search(r"micro-?batch|TBO|stage|stream", text, re.IGNORECASE))


def _balance(row: Row) -> Balance:
    text = row.get("eplb", "").lower()
    return "perfect" if "perfect" in text else "none" if text == "none" else "known"


def _drafts(row: Row) -> tuple[int, float | None]:
    drafts = about(row.get("mtp_draft"))
    return int(drafts or 0), about(row.get("accept_len")) if drafts else None


def _lengths(row: Row) -> Workload | None:
    isl, osl = number(row.get("isl")), number(row.get("osl"))
    return Workload(isl, osl) if isl and osl else None


def _context(row: Row) -> float:
    kv, work = number(row.get("kv_len")), _lengths(row)
    if kv is None and work is None:
        raise InputError("lengths are blank: give kv_len, or isl and osl")
    return work.context if kv is None and work else kv or 0.0


def _decode(row: Row, this: Card) -> Case:
    dies = _count(row, "dies_per_card") or this.dies_per_card
    cards, context = _cards(row), _context(row)
    found = _decode_shape(row, cards * dies)
    one = deployment(row, this, found, "decode")
    instances = found.instances or max(1, cards * dies // one.ranks)
    service = Service(one, instances)
    batch, assumed = _batch(row, service), _said(row)
    if batch is None:
        batch, assumed = _full(one, context), (*assumed, "batch not given: full memory")
    per_node = _count(row, "cards_per_node") or this.cards_per_node
    if row["phase"] == "rl-rollout":
        assumed = (*assumed, "lengths exponentially distributed")
    return Case(row["phase"], service, _lengths(row), instances * one.ranks / dies, dies, per_node, batch, context,
                assumed=assumed)  # fmt: skip


def _batch(row: Row, service: Service) -> float | None:
    per_group, everywhere = about(row.get("batch_per_rank")), about(row.get("global_batch"))
    if per_group is not None and per_group > 0:
        return per_group
    return everywhere / service.groups if everywhere else None


def _full(one: Deployment, context: float, prefill: float = 0.0) -> float:
    """Requests of a TP group that fill the memory, or the most rows that a low-latency exchange takes. prefill: rows of
    a rank in steps of prefill between those of decoding."""
    rows = MOST_ROWS * one.topology.tp / (1 + one.drafts)
    most = min(most_requests(one, context, prefill), rows)
    if most < 1:
        raise InputError(
            "without a batch memory would be filled, but the weights leave no room for a request"
        )
    return most


def _said(row: Row) -> tuple[str, ...]:
    unsaid = row.get("mtp_draft", "").strip() == "not stated"
    return ("drafts not stated: none",) if unsaid else ()


def _prefill(row: Row, this: Card) -> Case:
    dies = _count(row, "dies_per_card") or this.dies_per_card
    ranks = _cards(row) * dies
    isl = number(row.get("isl")) or number(row.get("kv_len"))
    if not isl:
        raise InputError("lengths are blank: give isl")
    found = shape(row.get("prefill_layout", ""), ranks)
    if found is None:
        raise InputError("prefill_layout is blank, or says no sizes such as DP32 EP32 or TP8")
    one = deployment(row, this, found, "prefill")
    tokens, assumed = _tokens(row, dies, isl)
    work = Workload(isl, 1, isl * _cached(row))
    per_node = _count(row, "cards_per_node") or this.cards_per_node
    return Case(
        "prefill", Service(one), work, one.ranks / dies, dies, per_node, tokens=tokens, assumed=assumed
    )


def _tokens(row: Row, dies: int, isl: float) -> tuple[float, tuple[str, ...]]:
    text = row.get("batch_per_rank", "")
    found = re.search(rf"{NUMBER}(k?)\s*tok", text)
    if found:
        tokens = float(found[1]) * (1024 if found[2] else 1)
        return tokens / (dies if "per card" in text else 1), ()
    requests = number(text)
    if requests:
        return requests * isl, ()
    return CHUNK / dies, (f"tokens of a step not given: {CHUNK} of a card",)


def _cached(row: Row) -> float:
    """Share of a prompt that was found in a cache, where the note says so."""
    found = re.search(rf"{NUMBER}% [\w ]*cache hits", row.get("note", ""))
    return float(found[1]) / 100 if found else 0.0


def _e2e(row: Row, this: Card) -> Case:
    dies = _count(row, "dies_per_card") or this.dies_per_card
    ranks, work = _cards(row) * dies, _lengths(row)
    if work is None:
        raise InputError("lengths are blank: give isl and osl")
    found = _decode_shape(row, ranks)
    one, instances = deployment(row, this, found, "decode"), found.instances or 1
    text = row.get("prefill_layout", "")
    left = ranks - instances * one.ranks
    service, assumed = Service(one, instances), _said(row)
    if left > 0 and "mixed" not in text:
        other = _prefill_shape(text, left, row, this)
        service = replace(
            service, prefill=deployment(row, this, other, "prefill"), prefill_instances=other.instances or 1
        )
    requests = _requests(row, service)
    if requests is None:
        prefill = chunk(one) / one.topology.tp if service.prefill is None else 0.0
        requests = _full(one, work.context, prefill) * service.groups
        assumed = (*assumed, "batch not given: full memory")
    per_node = _count(row, "cards_per_node") or this.cards_per_node
    return Case("e2e", service, work, ranks / dies, dies, per_node, requests, work.context, assumed=assumed)


def _requests(row: Row, service: Service) -> float | None:
    """In the whole service."""
    everywhere, batch = about(row.get("global_batch")), about(row.get("batch_per_rank"))
    return everywhere or (batch * service.groups if batch else None)


def _prefill_shape(text: str, left: int, row: Row, this: Card) -> Shape:
    """Of the ranks that do not decode. Where the text does not say how many a group has, they divide evenly."""
    found = shape(text, left) or Shape(1, left, left, 1)
    many = re.match(r"\s*(\d+)\s?x", text)
    instances = found.instances or (int(many[1]) if many else 1)
    per = left // instances
    if found.ranks != per:
        groups = found.groups if per % found.groups == 0 else 1
        found = Shape(per // groups, groups, found.experts)
    return replace(found, instances=instances)
