"""A plan, and a front of plans, as text."""

from collections.abc import Sequence
from typing import Any

Rows = list[Sequence[str]]


def table(rows: Rows, indent: str = "  ") -> str:
    """Columns of the width of their longest, numbers to the right. The first row is the head."""
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, column)) for column in columns]
    numbers = [all(cell[:1].isdigit() or cell[:1] in "+-" for cell in column[1:]) for column in columns]
    lines = []
    for row in rows:
        cells = (f"{c:>{w}}" if n else f"{c:{w}}" for c, w, n in zip(row, widths, numbers, strict=False))
        lines.append(indent + "  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def layout(one: dict[str, Any]) -> str:
    """An instance in a line."""
    ranks = one["expert_parallel"]
    where = f"{one['nodes']} node{'s' if one['nodes'] > 1 else ''} x {one['ranks_per_node']} ranks"
    parts = [f"{where}: attention TP{one['attention_tp']} x DP{one['data_parallel']}, EP{ranks}"]
    if one["redundant"]:
        parts.append(f"{one['redundant']} redundant slots")
    parts.append(f"weights {one['weights']}, cache {one['cache']}")
    if ranks > 1:
        parts.append(f"{one['exchange']} exchange ({one['dispatch']} to experts, {one['combine']} back)")
    parts.append(_drafts(one))
    parts.append("two micro-batches overlap" if one["overlap"] else "no overlap")
    several = f"{one['instances']} instances of " if one["instances"] > 1 else ""
    return several + ", ".join(parts)


def _drafts(one: dict[str, Any]) -> str:
    return "1 draft" if one["drafts"] == 1 else f"{one['drafts'] or 'no'} drafts"


def short(plan: dict[str, Any]) -> str:
    """A layout in a few words."""

    def of(one: dict[str, Any]) -> str:
        ways = "" if one["expert_parallel"] == 1 else f" {one['exchange']}"
        draft = f" {_drafts(one)}" if one["drafts"] else ""
        overlap = " overlap" if one["overlap"] else ""
        return (
            f"{one['instances']} x EP{one['expert_parallel']} TP{one['attention_tp']}{ways}{draft}{overlap}"
        )

    return of(plan["decode"]) + (f"; prefill {of(plan['prefill'])}" if plan["prefill"] else "")


def plan_text(document: dict[str, Any]) -> str:
    best = document["plans"][0]
    blocks = [_gives(best), _layout(best), _memory(best), _step(best), _next(document["next"]), _start(best)]
    if len(document["plans"]) > 1:
        blocks.append(_others(document["plans"]))
    return "\n\n".join(block for block in blocks if block)


def _gives(plan: dict[str, Any]) -> str:
    g = plan["gives"]
    ttft = "" if plan["mode"] == "elsewhere" else f"TTFT {g['ttft_ms']:.0f} ms, "
    return "\n".join(
        [
            f"{count(g['tokens_per_s_per_card'])} tokens/s per card, {count(g['tokens_per_s'])} in all "
            f"({count(g['requests_per_s'])} requests/s)",
            f"  {ttft}TPOT {g['tpot_ms']:.1f} ms ({g['tokens_per_s_per_user']:.1f} tokens/s for each user)",
            f"  {g['requests_in_flight']:,.0f} requests in flight; a TP group decodes {g['requests_per_group']:.1f}, "
            f"its memory holds {g['requests_per_group_in_memory']:.0f}; {g['rows_per_expert']:.1f} rows an expert",
            f"  limited by {', '.join(plan['limited_by'])}",
        ]
    )


def _layout(plan: dict[str, Any]) -> str:
    lines = ["Layout", f"  decoding  {layout(plan['decode'])}"]
    if plan["prefill"]:
        lines.append(
            f"  prefill   {layout(plan['prefill'])}, busy {plan['gives']['prefill_use']:.0%} of the time"
        )
    else:
        lines.append(
            "  prefill   elsewhere" if plan["mode"] == "elsewhere" else
            f"  prefill   by the same ranks between steps, {plan['gives']['prefill_use']:.0%} of the time"
        )  # fmt: skip
    traffic, uneven = plan["traffic"], plan["imbalance"]
    lines.append(
        f"  traffic   {traffic['dispatch_bytes'] / 1e3:.1f} KB across nodes to experts and "
        f"{traffic['combine_bytes'] / 1e3:.1f} KB back, a token and layer"
    )
    lines.append(
        f"  balance   the fullest rank has {uneven['lasting']:.2f} of the mean over many steps, and "
        f"{uneven['one_step']:.2f} in one"
    )
    return "\n".join(lines)


def _memory(plan: dict[str, Any]) -> str:
    def line(sizes: dict[str, float]) -> str:
        return ", ".join(f"{kind} {size:.2f}" for kind, size in sizes.items() if size >= 0.005)

    lines = ["Memory of a rank, GB", f"  decoding  {line(plan['memory_gb'])}"]
    if plan["prefill_memory_gb"]:
        lines.append(f"  prefill   {line(plan['prefill_memory_gb'])}")
    return "\n".join(lines)


def _step(plan: dict[str, Any]) -> str:
    step = plan["step"]
    rows: Rows = [("part", "ms", "of the step", "of its floor", "bound by")]
    for part in sorted(step["parts"], key=lambda part: -part["ms"]):
        if part["ms"] > 0:
            share = f"{part['ms'] / step['ms']:.0%}"
            of_floor = f"{part['of_floor']:.0%}" if part["floor_ms"] else ""
            rows.append((part["name"], f"{part['ms']:.2f}", share, of_floor, part["bound"]))
    hidden = (
        f"; {step['hidden_ms']:.1f} ms of its parts are hidden by overlap" if step["hidden_ms"] > 0.05 else ""
    )
    return (
        f"A step of decoding takes {step['ms']:.1f} ms, bound by {step['bound']}: resources at their peak would need "
        f"{step['floor_ms']:.1f} ms, {step['of_floor']:.0%} of it{hidden}\n{table(rows)}"
    )


def _next(advice: list[dict[str, Any]]) -> str:
    if not advice:
        return ""
    rows: Rows = [("tokens/s", "per card", "TPOT ms", "what would help next")]
    rows += [
        (f"{a['gain']:+.1%}", f"{a['per_card']:+.1%}", f"{a['tpot_ms']:.1f}", a["change"]) for a in advice
    ]
    return table(rows, "")


def _start(plan: dict[str, Any]) -> str:
    lines = ["Start it so:", *(f"  {line}" for line in plan["start"])]
    return "\n".join([*lines, "But today:", *(f"  - {note}" for note in plan["notes"])])


def _others(plans: list[dict[str, Any]]) -> str:
    return table([("", *HEAD), *([f"{i}.", *_row(plan)] for i, plan in enumerate(plans, 1))], "")


HEAD = ("tokens/s/card", "tokens/s/user", "TPOT ms", "TTFT ms", "in flight", "layout")


def _row(plan: dict[str, Any]) -> tuple[str, ...]:
    g = plan["gives"]
    return (
        count(g["tokens_per_s_per_card"]), f"{g['tokens_per_s_per_user']:.1f}", f"{g['tpot_ms']:.1f}",
        f"{g['ttft_ms']:.0f}", f"{g['requests_in_flight']:.0f}", short(plan),
    )  # fmt: skip


def front_text(plans: list[dict[str, Any]]) -> str:
    return table([HEAD, *(_row(plan) for plan in plans)], "")
