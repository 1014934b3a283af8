"""What only a card can show, thing by thing, and whether the examination has shown it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.bench.accelerator.profile import speeds
from expertmesh.planner.cards import card

COMPILED, FUSED = ("triton",), ("npu", "torch_npu")  # origins of ops
OWN = "two_tier"  # the engine's own exchange
PLAIN, QUANTISED = "bf16", "w8a8"  # weights of models that write tokens, in the words of `convert`
SHARE = 0.5  # of a data sheet's memory and products that a card has to reach
SEND = "send report.md and report.json with this line"

Row = Mapping[str, Any]
Judged = tuple[str, str]


@dataclass(frozen=True)
class Tick:
    """what: is shown; lines: of the report that show it; advice: what to do where it has failed."""

    id: str
    what: str
    lines: str
    judge: Callable[[Mapping[str, Any]], Judged]
    advice: str = SEND


def judge(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """State and reason of everything. Where the card itself could not be used nothing else has been shown."""
    usable = report["device"]["state"] == "ok"
    found = []
    for tick in TICKS:
        state, why = tick.judge(report) if usable or tick.id == "device" else ("failed", "not examined")
        advice = tick.advice if state not in ("ok", "none") else ""
        found.append(
            {
                "id": tick.id,
                "what": tick.what,
                "lines": tick.lines,
                "state": state,
                "why": why,
                "advice": advice,
            }
        )
    return found


def _device(report: Mapping[str, Any]) -> Judged:
    device = report["device"]
    return device["state"], device["why"] or str(device["name"])


def named(row: Row) -> str:
    return f"{row['op']}, {row['size']}, {row['rows']}, {row['precision']}"


def _worst(rows: Sequence[Row], nothing: str, good: str) -> Judged:
    """Of rows with a state: the first that is wrong, how many there are, or `good`. nothing: where all are none."""
    wrong = [row for row in rows if row["state"] not in ("ok", "none")]
    ran = [row for row in rows if row["state"] == "ok"]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return wrong[0]["state"], f"{wrong[0]['title']}: {wrong[0]['why']}{more}"
    return ("ok", good.format(len(ran))) if ran else ("none", nothing)


def _ops(report: Mapping[str, Any], wanted: Callable[[Row], bool]) -> list[dict[str, Any]]:
    """Rows by the origin that the table names, also of ops that never came back."""
    origins = report["device"]["kernels"]
    rows = [{"origin": origins[row["op"]], **row, "title": named(row)} for row in report["ops"]]
    return [row for row in rows if wanted(row)]


def _right(row: dict[str, Any]) -> dict[str, Any]:
    """Judged by its numbers alone, not by whether they repeat."""
    if row.get("error") is not None and row["error"] <= row["bound"]:
        return row | {"state": "ok"}
    return row


def _compiled(report: Mapping[str, Any]) -> Judged:
    """What ran was compiled, whatever its numbers are."""
    rows = _ops(report, lambda row: row["origin"] in COMPILED)
    ran = [row | {"state": "ok"} if row["state"] == "failed" else row for row in rows]
    lacking = report["device"]["lacking"]
    if report["kind"] != "cpu" and lacking:
        return "failed", lacking
    return _worst(ran, "no op here is made of kernels in Triton", "{} runs of ops")


def _kernels(report: Mapping[str, Any]) -> Judged:
    rows = _ops(
        report, lambda row: row["origin"] not in FUSED and row["precision"] in ("float32", "bfloat16")
    )
    return _worst([_right(row) for row in rows], "no op ran", "{} runs of ops")


def _fused(report: Mapping[str, Any]) -> Judged:
    rows = _ops(report, lambda row: row["origin"] in FUSED)
    return _worst([_right(row) for row in rows], "no op here is one of Ascend's own", "{} runs of ops")


def _precision(name: str) -> Callable[[Mapping[str, Any]], Judged]:
    def judge(report: Mapping[str, Any]) -> Judged:
        rows = _ops(report, lambda row: row["precision"] == name)
        reason = next((row["why"] for row in rows if row["state"] == "none"), "no op has it")
        return _worst([_right(row) for row in rows], reason, "{} runs of ops")

    return judge


def _repeats(report: Mapping[str, Any]) -> Judged:
    rows = _ops(report, lambda row: "same" in row)
    judged = [row | {"state": "ok" if row["same"] else "failed"} for row in rows]
    least = min((row["runs"] for row in rows), default=0)
    return _worst(judged, "no op ran", f"{{}} ops with the same input, {least} times or more each")


def _check(name: str) -> Callable[[Mapping[str, Any]], Judged]:
    def judge(report: Mapping[str, Any]) -> Judged:
        row = next(row for row in report["checks"] if row["name"] == name)
        return row["state"], row["why"]

    return judge


def _collectives(report: Mapping[str, Any]) -> Judged:
    rows = [{**row, "title": f"{row['kind']} of {row['bytes']} bytes"} for row in report["links"]]
    return _worst(
        rows, "one card has nobody to talk to", "{} exchanges between " + f"{report['cards']} cards"
    )


def _tokens(
    cluster: bool, native: bool = False, weights: str = PLAIN
) -> Callable[[Mapping[str, Any]], Judged]:
    def judge(report: Mapping[str, Any]) -> Judged:
        rows = [row | {"title": row["exchange"]} for row in report["tokens"] if (row["cards"] > 1) == cluster]
        rows = [row for row in rows if (row["exchange"] != OWN) == native and row["weights"] == weights]
        if not rows:
            return "none", "there are none for this device" if native else "one card"
        state, why = _worst(rows, rows[0]["why"], "{} of them")
        if state != "ok":
            return state, why
        total, other = (sum(row.get(name, 0) for row in rows) for name in ("tokens", "different"))
        return "ok", f"{total} tokens, {other} of them not the reference's choice, but as likely"

    return judge


def _speed(report: Mapping[str, Any]) -> Judged:
    if report["known"] is None:
        return "none", "the planner knows no card of this name to compare with"
    sheet, found = card(report["known"]), speeds(report)
    memory = max(found.get("memory, read", 0.0), found.get("memory, copied", 0.0)) / sheet.memory_gbs
    products = found.get("products, bfloat16", 0.0) / sheet.bf16_tflops
    text = f"memory {memory:.0%}, products {products:.0%} of {sheet.title}"
    return ("ok" if min(memory, products) >= SHARE else "failed"), text


TICKS = (
    Tick(
        "device", "the card is found, and computes", "device", _device,
        "look into the driver's own log (dmesg; ~/ascend/log), and whether another process holds the card",
    ),
    Tick(
        "code", "the compiler's last step makes code of every kernel", "ops by Triton that were not refused", _compiled,
        "see whether triton (CUDA) or triton-ascend with CANN (Ascend) is installed, in versions that fit; " + SEND,
    ),
    Tick("kernels", "kernels give the reference's numbers on the card's units", "ops in float32, bfloat16", _kernels),
    Tick("fused", "so do Ascend's own ops", "ops whose origin is torch_npu", _fused),
    Tick("int8", "so do ops with weights and rows in INT8", "ops in w8a8", _precision("w8a8")),
    Tick("fp8", "so do ops with weights in FP8", "ops in fp8", _precision("fp8")),
    Tick(
        "repeats", "no races: an op that runs again with the same input gives the same bits", "runs, same", _repeats,
        "run it again with nothing else on the card; " + SEND,
    ),
    Tick("layout", "weights in Ascend's layout FRACTAL_NZ mean the same", "checks: layout", _check("layout")),
    Tick("graph", "a step that was recorded gives the same numbers", "checks: graph", _check("graph")),
    Tick(
        "streams", "copies and products run at the same time, and do no harm", "checks: streams", _check("streams")
    ),
    Tick(
        "collectives", "HCCL or NCCL carries rows between all cards undamaged", "links", _collectives,
        "see whether the cards reach each other (npu-smi info -t topo; nvidia-smi topo -m); " + SEND,
    ),
    Tick("tokens", "the demo model writes the CPU's tokens on one card", "tokens of 1 card", _tokens(False)),
    Tick(
        "converted", "and with weights that convert wrote in W8A8", "tokens in w8a8", _tokens(False, weights=QUANTISED)
    ),
    Tick("cluster", "and on all cards", "tokens of all cards", _tokens(True)),
    Tick(
        "exchange", "and there with the makers' own exchanges", "tokens by exchange", _tokens(True, native=True),
    ),
    Tick(
        "speed", "memory and products are as fast as the card's data sheet lets expect", "speeds", _speed,
        "see whether the card is throttled, shared or in a power-saving mode",
    ),
)  # fmt: skip
