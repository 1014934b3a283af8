"""What published rows with blank results would have measured."""

from dataclasses import dataclass
from math import e, exp, log

from expertmesh.errors import InputError
from expertmesh.planner.costs import Step, accepted_tokens, decode_step, prefill_step
from expertmesh.planner.deployment import Decode, Prefill
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.rows import Case, Row, case
from expertmesh.planner.serving import Workload, serve

LONGEST = 6  # mean lengths that an output of a rollout may have
COLUMNS = ("tok_s_per_card", "tok_s_per_node", "ttft_ms", "tpot_ms", "bound_by", "assumed", "refused")


@dataclass(frozen=True)
class Answer:
    """Tokens/s of output, or of input where the phase is prefill: over all cards where it is e2e, else over those of
    that phase. Times in ms, None where the phase has none. assumed: what the row does not say; refused: why there is
    no answer."""

    tok_s_per_card: float | None = None
    tok_s_per_node: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    bound_by: str = ""
    assumed: str = ""
    refused: str = ""

    def columns(self) -> dict[str, str]:
        values = ((name, getattr(self, name)) for name in COLUMNS)
        return {name: f"{v:.5g}" if isinstance(v, float) else v or "" for name, v in values}


def predict(row: Row, p: Parameters | None = None) -> Answer:
    """The answer to one row, or why there is none."""
    try:
        return answer(case(row), p)
    except InputError as error:
        return Answer(refused=str(error))


def answer(what: Case, p: Parameters | None = None) -> Answer:
    one = what.service.decode
    tpot: float | None = None
    if what.phase == "prefill" and what.work:
        step = prefill_step(one, Prefill(what.tokens, what.work.input, what.work.cached), p)
        per_card = (
            what.tokens * (what.work.input / (what.work.input - what.work.cached)) / step.seconds * what.dies
        )
        ttft: float | None = step.seconds
    elif what.phase == "e2e" and what.work:
        found = serve(what.service, what.work, what.batch, p)
        step, tpot, ttft, per_card = found.step, found.tpot, found.ttft, found.tokens / what.cards
    elif what.phase == "rl-rollout" and what.work:
        step, tpot, ttft = *_rollout(what, what.work, p), None
        per_card = what.batch * what.service.groups / tpot / what.cards
    else:
        step, ttft = decode_step(one, Decode(what.batch, what.context), p), None
        tpot = step.seconds / accepted_tokens(one)
        per_card = what.batch * what.service.groups / tpot / what.cards
    return Answer(
        per_card, per_card * what.cards_per_node, ttft and ttft * 1e3, tpot and tpot * 1e3, step.bound,
        "; ".join(what.assumed),
    )  # fmt: skip


def _rollout(what: Case, work: Workload, p: Parameters | None) -> tuple[Step, float]:
    """All requests start at once and none follows: output lengths are taken to be exponentially distributed, so that
    the batch decays, and the longest decides. The first step, and seconds of it all for a token of the mean length."""
    one, parts = what.service.decode, 16
    last = min(log(max(what.batch * what.service.groups, e)), LONGEST)
    steps = []
    for part in range(parts):
        passed = (part + 0.5) / parts * last
        load = Decode(what.batch * exp(-passed), work.input + work.output * passed)
        steps.append(decode_step(one, load, p))
    seconds = sum(step.seconds for step in steps) / parts * last / accepted_tokens(one)
    return steps[0], seconds
