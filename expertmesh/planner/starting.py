"""The line that starts the engine as a plan says, and what the engine does not do yet of it."""

from collections.abc import Iterator
from math import ceil

from expertmesh.mesh.traffic import ALGORITHMS
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.memory import cache_bytes
from expertmesh.planner.plans import Plan
from expertmesh.planner.serving import chunk

ENGINE_CACHE = "bf16"


def lines(plan: Plan, model: str) -> Iterator[str]:
    """One for an instance that decodes, and one for an instance that prefills where that is apart. model: folder."""
    work, service = plan.work, plan.service
    batch = max(1, ceil(plan.outcome.batch))
    yield _line(service.decode, model, batch, work.input + work.output, plan.work.context)
    if service.prefill is not None:
        batch = max(1, int(chunk(service.prefill) // work.input))
        yield _line(service.prefill, model, batch, work.input + 1, work.input)


def _line(d: Deployment, model: str, batch: int, longest: float, context: float) -> str:
    topology = d.topology
    options = {
        "--quantise": d.weights.engine or "none",
        "--nodes": topology.nodes,
        "--cards": topology.cards_per_node,
        "--attention-tp": topology.tp,
        "--ranks": "processes",
        "--exchange": _exchange(d),
        "--redundant": d.redundant,
        "--overlap": "on" if d.overlap else "off",
        "--max-context": ceil(longest),
        "--max-batch-requests": batch,
        "--max-batch-tokens": max(int(chunk(d)), batch),
        "--cache-tokens": max(ceil(longest), ceil(batch * context)),
    }
    if d.redundant and d.balance != "none":
        options["--rebalance"] = "auto"
    if topology.nodes > 1:
        options["--join"] = "HOST:PORT"
    words = " ".join(f"{name} {value}" for name, value in options.items())
    return f"expertmesh serve {model} {words}"


def _exchange(d: Deployment) -> str:
    """The engine's algorithm of the same formats, or else the one that is nearest."""
    wanted = (len(d.how.hops), d.how.dispatch, d.how.combine)
    for name, a in ALGORITHMS.items():
        if (len(a.hops), a.dispatch, a.combine) == wanted:
            return name
    return "flat" if len(d.how.hops) == 1 else "two_tier"


def notes(plan: Plan) -> Iterator[str]:
    """What differs between the plan and what the engine does today."""
    service, d = plan.service, plan.service.decode
    if service.instances > 1:
        yield f"start the first line {service.instances} times, on other nodes, behind a balancer of requests"
    if plan.mode == "apart":
        if service.prefill_instances > 1:
            yield f"start the second line {service.prefill_instances} times, on other nodes"
        yield "prefill on nodes of its own is not built yet: the engine would prefill between steps of decoding"
    if d.drafts:
        yield f"drafts are not built yet: the engine decodes without the {d.drafts} planned"
    if d.cache_precision != ENGINE_CACHE:
        size = cache_bytes(d) / 1e3
        more = f"{2 * size:.1f} KB a token, not {size:.1f}"
        yield f"the engine keeps the cache in bfloat16 and not in {d.cache_precision}: {more}"
    if d.weights.engine is None:
        yield f"the engine has no kernels for {d.weight_precision} weights"
    elif d.weights.engine == "fp8" and d.model.fp8_block != (128, 128):
        yield "the engine takes FP8 weights only as a checkpoint has them, and this model's has none"
    if d.ranks > 1 and d.model.moe_layers and _differs(d):
        yield f"the engine has no {d.exchange} exchange {_formats(d)}; its {_exchange(d)} is the nearest"
    yield f"kernels for the {d.card.title} are not in the engine yet, which computes on CPUs today"


def _differs(d: Deployment) -> bool:
    a = ALGORITHMS[_exchange(d)]
    same = (len(a.hops), a.dispatch, a.combine) == (len(d.how.hops), d.how.dispatch, d.how.combine)
    return not same or d.exchange not in (*ALGORITHMS,)


def _formats(d: Deployment) -> str:
    if d.exchange not in ALGORITHMS:
        return "of all rows to all ranks"
    return f"with {d.how.dispatch or 'bf16'} to experts and {d.how.combine or 'bf16'} back"
