"""`expertmesh plan replay-news`: an announced result, claim by claim, beside what the planner finds."""

import argparse
import json
from typing import Any

from expertmesh.planner.better import Better
from expertmesh.planner.news import Claim, News, beaten, claims
from expertmesh.planner.serving import Workload

TITLE = (
    "Announced by iFlytek and Huawei on 11 March 2025, 64 Ascend cards against two machines, and what the planner "
    "finds for DeepSeek-V3 on Ascend 910B:"
)


def add_news(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "replay-news", help="an announced result (16 against 64 cards of Ascend 910B), claim by claim"
    )
    add = parser.add_argument
    add("--input", type=float, default=3500, metavar="TOKENS", help="of a request (default: 3500)")
    add("--output", type=float, default=1500, metavar="TOKENS", help="of a request (default: 1500)")
    add("--tpot", type=float, action="append", metavar="MS",
        help="limit under which a better layout is sought; repeatable (default: 50 and 100)")  # fmt: skip
    add("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(plan=_run)


def _run(args: argparse.Namespace) -> int:
    news = News.of(Workload(args.input, args.output))
    limits: list[float] = args.tpot or [50.0, 100.0]
    layouts = {limit: beaten(news, limit / 1e3) for limit in limits}
    found = claims(news)
    if args.json:
        plain = [_better_json(limit, *pair) for limit, pair in layouts.items()]
        print(json.dumps({"claims": [_claim_json(claim) for claim in found], "better": plain}))
        return 0
    print(TITLE)
    for claim in found:
        print("\n" + "\n".join(_claim_text(claim)))
    for limit, (better, weights) in layouts.items():
        print("\n" + "\n".join(_better_text(limit, better, weights)))
    return 0


def _claim_json(claim: Claim) -> dict[str, Any]:
    return {
        "claim": claim.name,
        "kind": claim.kind,
        "announced": claim.announced,
        "found": [{"value": found.value, "assumption": found.assumption} for found in claim.findings],
        "figures": dict(claim.figures),
        "assumes": claim.assumes,
        "verdict": claim.verdict,
        "verdict_with_other_starts": dict(claim.otherwise),
    }


def _claim_text(claim: Claim) -> list[str]:
    announced = "nothing announced" if claim.announced is None else f"announced {claim.announced_text}"
    lines = [f"{claim.name}: {announced}"]
    lines += [f"  {claim.verdict}"] if claim.verdict else []
    others = "; ".join(f"with {start}: {verdict}" for start, verdict in claim.otherwise.items())
    lines += [f"  this depends on an estimate, the start of an exchange; {others}"] if others else []
    lines += [f"  {claim.text(f.value):>8}  {f.assumption or 'found'}" for f in claim.findings]
    lines += [f"  {value:>12,.2f}  {name}" for name, value in claim.figures.items()]
    if claim.assumes:
        lines.append(f"  assumes: {claim.assumes}")
    return lines


def _better_json(limit: float, found: list[Better], weights: list[Better]) -> dict[str, Any]:
    return {
        "tpot_limit_ms": limit,
        "announced": _layout_json(found[-1]),
        "best": _layout_json(found[0]),
        "best_with_other_weights": _layout_json(weights[0]) if weights else None,
    }


def _layout_json(one: Better) -> dict[str, Any]:
    d, o = one.deployment, one.outcome
    return {
        "attention_tp": d.topology.tp,
        "exchange": d.exchange,
        "overlap": d.overlap,
        "redundant": d.redundant,
        "weights": d.weight_precision,
        "tokens_s_per_card": o.tokens / d.ranks,
        "tpot_ms": o.tpot * 1e3,
        "ttft_ms": o.ttft * 1e3,
        "requests_of_a_group": o.batch,
        "changes": list(one.changes),
        "gain": one.gain,
    }


def _better_text(limit: float, found: list[Better], weights: list[Better]) -> list[str]:
    announced, best = found[-1], found[0]
    lines = [
        f"on the same 64 cards, at most {limit:g} ms a token, prefill between the steps:",
        f"  {_layout_text(announced)}  announced: {_named(announced)}",
    ]
    if best is announced:
        return [*lines, "  no other attention TP, exchange, overlap or redundancy gives more"]
    lines.append(
        f"  {_layout_text(best)}  best: {_named(best)}; x{best.gain:.2f} ({', '.join(best.changes)})"
    )
    if weights:
        gain = f"x{weights[0].gain:.2f} more ({', '.join(weights[0].changes)})"
        lines.append(f"  {_layout_text(weights[0])}  and with fewer bits, where quality allows: {gain}")
    return lines


def _layout_text(one: Better) -> str:
    return (
        f"{one.outcome.tokens / one.deployment.ranks:8.1f} tokens/s a card, {one.outcome.tpot * 1e3:6.1f} ms"
    )


def _named(one: Better) -> str:
    d = one.deployment
    overlap = "with" if d.overlap else "without"
    return f"TP{d.topology.tp} x DP{d.topology.groups}, {d.exchange}, {overlap} overlap, {d.weight_precision}"
