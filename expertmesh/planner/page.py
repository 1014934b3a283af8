"""A plan as a page of HTML that needs nothing else: the front, a step by part, memory by kind. Each picture has its
numbers in a table below it."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from expertmesh.planner.svg import Dot, Piece, bars, scatter

BOUNDS = ("compute", "memory", "link in node", "link across", "latency")
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1a1a1a; --soft: #d8d8d8; --accent: #0b5cad; --mark: #b3261e;
  --c0: #2a78b8; --c1: #c96a12; --c2: #3f8f4f; --c3: #8a4fb0; --c4: #7d7d7d; --c5: #b58a00; --c6: #178a94;
  --c7: #b34a74; --free: #ececec; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #ececec; --soft: #3c4046; --accent: #6db3f2;
  --mark: #ff8a80; --c0: #5aa7e0; --c1: #f09a4a; --c2: #6cc17d; --c3: #ba8ae0; --c4: #a0a0a0; --c5: #e0b93c;
  --c6: #4cc0ca; --c7: #e582a8; --free: #2a2d31; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; background: var(--back);
  color: var(--text); }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
.grid { stroke: var(--soft); fill: none; } .line { stroke: var(--accent); fill: none; stroke-width: 2; }
.dot { fill: var(--accent); } .chosen { fill: var(--mark); stroke: var(--text); }
table { border-collapse: collapse; margin: .5em 0; } caption { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid var(--soft); padding: .15em .7em; text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.text { text-align: left; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""
STYLE += "".join(
    f"rect.c{i} {{ fill: var(--c{i}); }} .key.c{i} {{ background: var(--c{i}); }}\n" for i in range(8)
)
STYLE += "rect.free { fill: var(--free); } .key.free { background: var(--free); }\n"


def page(document: dict[str, Any]) -> str:
    """document: as `expertmesh plan --json` prints it."""
    best = document["plans"][0]
    parts = [_best(best), _front(document["front"], best), _step(best["step"]), _memory(best)]
    parts += [_next(document["next"]), _start(best)]
    title = escape(document["title"])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _best(plan: dict[str, Any]) -> str:
    g = plan["gives"]
    said = (
        f"{g['tokens_per_s_per_card']:.0f} tokens/s per card, {g['tokens_per_s']:,.0f} in all; "
        f"TPOT {g['tpot_ms']:.1f} ms, TTFT {g['ttft_ms']:.0f} ms; {g['requests_in_flight']:,.0f} requests in flight; "
        f"limited by {', '.join(plan['limited_by'])}."
    )
    parts = [("decoding", plan["decode"])] + ([("prefill", plan["prefill"])] if plan["prefill"] else [])
    names = list(plan["decode"])
    rows = [(name.replace("_", " "), *(_said(one[name]) for _, one in parts)) for name in names]
    return f"<p>{escape(said)}</p>" + _table("Layout", ("", *(name for name, _ in parts)), rows)


def _front(front: Sequence[dict[str, Any]], best: dict[str, Any]) -> str:
    if not front:
        return ""
    plans = [best, *front] if best not in front else list(front)
    dots = [
        Dot(
            g["tpot_ms"],
            g["tokens_per_s_per_card"],
            f"{_layout(plan)}: TPOT {g['tpot_ms']:.1f} ms",
            plan == best,
        )
        for plan in sorted(plans, key=lambda plan: float(plan["gives"]["tpot_ms"]))
        for g in [plan["gives"]]
    ]
    title = "The front: tokens/s per card against TPOT; the plan above is marked"
    picture = scatter(title, "TPOT, ms", "tokens/s per card", dots, "front")
    rows = [
        (
            _layout(plan), f"{g['tpot_ms']:.1f}", f"{g['tokens_per_s_per_user']:.1f}",
            f"{g['tokens_per_s_per_card']:.0f}", f"{g['ttft_ms']:.0f}",
            f"{g['requests_in_flight']:.0f}", plan["step"]["bound"],
        )
        for plan in front
        for g in [plan["gives"]]
    ]  # fmt: skip
    head = ("layout", "TPOT ms", "tokens/s per user", "tokens/s per card", "TTFT ms", "requests", "bound by")
    return f"<h2>The front</h2>{picture}{_table('Best layout for each latency', head, rows)}"


def _said(value: Any) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def _layout(plan: dict[str, Any]) -> str:
    d, other = plan["decode"], plan["prefill"]
    text = f"{d['instances']} x EP{d['expert_parallel']} TP{d['attention_tp']}, {d['drafts']} drafts"
    return text + (f"; prefill {other['instances']} x EP{other['expert_parallel']}" if other else "")


def _keys(names: Iterable[tuple[str, str]]) -> str:
    return "<p>" + "".join(f'<span class="key {kind}"></span>{escape(name)}' for name, kind in names) + "</p>"


def _step(step: dict[str, Any]) -> str:
    parts = sorted((part for part in step["parts"] if part["ms"] > 0), key=lambda part: -float(part["ms"]))
    kinds = {bound: f"c{i}" for i, bound in enumerate(BOUNDS)}
    rows = [
        (
            part["name"],
            [
                Piece(
                    part["name"],
                    part["ms"],
                    kinds[part["bound"]],
                    f"{part['name']}: {part['ms']:.2f} ms, {part['bound']}",
                )
            ],
        )
        for part in parts
    ]
    title = f"Parts of a step of decoding of {step['ms']:.1f} ms, coloured by what binds them"
    picture = bars(title, rows, max(part["ms"] for part in parts), "step")
    cells = [
        (
            part["name"],
            f"{part['ms']:.2f}",
            f"{part['floor_ms']:.2f}",
            f"{part['of_floor']:.0%}",
            part["bound"],
        )
        for part in parts
    ]
    cells.append(
        (
            "whole step",
            f"{step['ms']:.2f}",
            f"{step['floor_ms']:.2f}",
            f"{step['of_floor']:.0%}",
            step["bound"],
        )
    )
    head = ("part", "ms", "floor, ms", "of its floor", "bound by")
    return (
        f"<h2>A step of decoding</h2>{_keys(kinds.items())}{picture}"
        f"{_table('Time by part; the floor is what resources need at their peak', head, cells)}"
    )


def _memory(plan: dict[str, Any]) -> str:
    uses = [("decoding", plan["memory_gb"])]
    uses += [("prefill", plan["prefill_memory_gb"])] if plan["prefill_memory_gb"] else []
    names = list(dict.fromkeys(kind for _, sizes in uses for kind in sizes))
    kinds = {name: f"c{i % 8}" for i, name in enumerate(name for name in names if name != "free")} | {
        "free": "free"
    }
    rows = [
        (where, [Piece(kind, size, kinds[kind], f"{kind}: {size:.2f} GB") for kind, size in sizes.items()])
        for where, sizes in uses
    ]
    most = max(sum(max(size, 0.0) for size in sizes.values()) for _, sizes in uses)
    picture = bars("Memory of a rank by kind, GB", rows, most, "memory")
    cells = [(kind, *(f"{sizes.get(kind, 0.0):.3f}" for _, sizes in uses)) for kind in names]
    return (
        f"<h2>Memory of a rank</h2>{_keys((name, kinds[name]) for name in names)}{picture}"
        f"{_table('GB by kind', ('kind', *(where for where, _ in uses)), cells)}"
    )


def _next(advice: Sequence[dict[str, Any]]) -> str:
    if not advice:
        return ""
    rows = [
        (a["change"], f"{a['gain']:+.1%}", f"{a['per_card']:+.1%}", f"{a['tpot_ms']:.1f}") for a in advice
    ]
    head = ("change", "tokens/s in all", "per card", "TPOT ms")
    return f"<h2>What would help next</h2>{_table('One change each, by the model', head, rows)}"


def _start(plan: dict[str, Any]) -> str:
    lines = "\n".join(escape(line) for line in plan["start"])
    notes = "".join(f"<li>{escape(note)}</li>" for note in plan["notes"])
    return f"<h2>Start it so</h2><pre>{lines}</pre><p>But today:</p><ul>{notes}</ul>"
