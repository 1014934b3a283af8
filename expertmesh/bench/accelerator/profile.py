"""The card that was measured, as the planner takes it: measured numbers, and where there are none those of the card of
this name that the planner knows."""

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from expertmesh.errors import InputError
from expertmesh.planner.cards import MAY_BE_ZERO, NUMBERS, Card, card

HOW = "measured {date} by `expertmesh doctor --accelerator`: {what}"
# Systems on a chip of Ascend 910C (A3) are called so.
A3 = "ascend910_93"
DEFAULTS = {"fp4_tflops": "not measured", "peer_us": "not measured", "cache_mb": "not measured"}


def known_card(name: str) -> str | None:
    """The planner's name of a card that its driver calls so."""
    plain = name.lower().strip()
    guess = "ascend-910c" if plain.startswith(A3) else re.sub(r"^ascend[ _-]?910", "910", plain)
    try:
        return card(guess.removesuffix(".toml")).name
    except InputError:
        return None


def speeds(report: Mapping[str, Any]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in report["speeds"] if row["state"] == "ok"}


def peaks(report: Mapping[str, Any]) -> dict[str, float]:
    """What ops are compared with: GB/s of the memory, and TFLOPS by the precision of an op."""
    found = speeds(report)
    limits = {
        "memory": max(found.get("memory, copied", 0.0), found.get("memory, read", 0.0)),
        "float32": found.get("products, float32", 0.0),
        "bfloat16": found.get("products, bfloat16", 0.0),
    }
    limits["w8a8"] = max(
        found.get("products, int8", 0.0), found.get("products, w8a8", 0.0), limits["bfloat16"]
    )
    limits["fp8"] = max(found.get("products, fp8", 0.0), limits["bfloat16"])
    return limits


def profile(report: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Every number of a card with its source, in the planner's units. None where memory or products could not be
    measured."""
    found = _measured(report)
    if not {"memory_gbs", "bf16_tflops"} <= found.keys():
        return None
    known = card(report["known"]) if report["known"] else None
    entries = {name: found.get(name) or _unmeasured(name, known, found) for name in NUMBERS}
    return {
        name: {"value": value if isinstance(value, int) else float(f"{value:.4g}"), "source": source}
        for name, (value, source) in entries.items()
    }


def _measured(report: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """In the order of no matter what; nothing that is not above 0 where it has to be."""
    limits, found, device = peaks(report), speeds(report), report["device"]
    cards = report["cards"]
    small, large = _links(report)
    alone = "as its own memory, for want of a second card"
    rows: dict[str, tuple[float, str]] = {
        "memory_gb": (device.get("memory_bytes", 0) / 1e9, "of the card, as its driver says"),
        "memory_gbs": (limits["memory"], "the faster of reading and copying"),
        "bf16_tflops": (limits["bfloat16"], "a large product"),
        "fp32_tflops": (limits["float32"], "a large product"),
        "int8_tflops": (
            max(found.get("products, int8", 0.0), found.get("products, w8a8", 0.0)),
            "a large product, the faster of torch's and the op table's",
        ),
        "fp8_tflops": (found.get("products, fp8", 0.0), "a large product"),
        "launch_us": (
            found.get("start of an op", 0.0),
            "ops that have next to nothing to do, one after the other",
        ),
        "cards_per_node": (cards, "cards that were examined"),
        "domain_ranks": (cards, "cards that were examined"),
        "dies_per_card": (1, "a rank is a card"),
    }
    if large:
        rows |= {
            "node_gbs": (large["neighbours"]["gbs"], "to the next card"),
            "bulk_gbs": (large["all_to_all"]["gbs"], "all_to_all of all cards"),
            "node_us": (small["neighbours"]["us"], "a small message to the next card"),
            "dispatch_us": (small["all_to_all"]["us"], "a small all_to_all"),
            "combine_us": (small["all_to_all"]["us"], "a small all_to_all"),
        }
    elif not report["known"]:
        rows |= dict.fromkeys(("node_gbs", "bulk_gbs"), (limits["memory"], alone))
    how = {name: (value, HOW.format(date=date.today(), what=what)) for name, (value, what) in rows.items()}
    return {name: each for name, each in how.items() if each[0] > 0}


def _links(report: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Small and large messages by kind; none where any of them failed."""
    rows = report["links"]
    if not rows or any(row["state"] != "ok" for row in rows):
        return {}, {}
    sizes = sorted({row["bytes"] for row in rows})
    by_size = ({row["kind"]: row for row in rows if row["bytes"] == size} for size in (sizes[0], sizes[-1]))
    small, large = by_size
    return small, large


def _unmeasured(name: str, known: Card | None, found: Mapping[str, tuple[float, str]]) -> tuple[float, str]:
    """Of the card of this name that is known, else as inside the machine, else none."""
    if known is not None:
        return getattr(
            known, name
        ), f"not measured, of the planner's {known.name}: {known.sources.get(name, '')}"
    inside = {"across_gbs": "node_gbs", "across_us": "node_us"}.get(name, "")
    if inside in found:
        return found[inside][0], f"not measured: as inside the machine ({inside})"
    if name in MAY_BE_ZERO:
        return 0.0, "not measured, or not in hardware"
    return found["launch_us"][0] if name.endswith("us") else 1.0, "not measured"
