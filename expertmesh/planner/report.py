"""What a plan is and gives, as plain data: for JSON, tables and pictures."""

from typing import Any

from expertmesh.planner.costs import Step, accepted_tokens, collects
from expertmesh.planner.deployment import COLLECTIVE, Deployment
from expertmesh.planner.exchange import crossing_bytes
from expertmesh.planner.imbalance import imbalance, systematic
from expertmesh.planner.memory import RESERVED, cache_bytes, static_memory, workspace_bytes
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.plans import MOST_USE, Limits, Plan, prefill_rows, prompts_of_a_step
from expertmesh.planner.serving import chunk
from expertmesh.planner.starting import lines, notes

CLOSE = 0.985  # of a limit, at which it is what decides


def report(plan: Plan, limits: Limits, model: str, p: Parameters | None = None) -> dict[str, Any]:
    """A plan. GB are 1e9 bytes; tokens are of output."""
    service, p = plan.service, p or plan.service.decode.card.reached
    there = service.prefill
    return {
        "mode": plan.mode,
        "decode": instance(service.decode, service.instances),
        "prefill": there and instance(there, service.prefill_instances),
        "gives": gives(plan),
        "limited_by": limited_by(plan, limits),
        "memory_gb": memory(plan),
        "prefill_memory_gb": there and prefill_memory(there, plan.work.input),
        "traffic": traffic(service.decode),
        "imbalance": unevenness(service.decode, plan.outcome.step.rows, p),
        "step": step(plan.outcome.step),
        "start": list(lines(plan, model)),
        "notes": list(notes(plan)),
    }


def instance(d: Deployment, instances: int) -> dict[str, Any]:
    """The layout of each of so many instances."""
    how = d.how
    return {
        "instances": instances,
        "nodes": d.topology.nodes,
        "ranks_per_node": d.topology.cards_per_node,
        "attention_tp": d.topology.tp,
        "data_parallel": d.topology.groups,
        "expert_parallel": d.ranks,
        "redundant": d.redundant,
        "slots": d.slots,
        "weights": d.weight_precision,
        "cache": d.cache_precision,
        "exchange": d.exchange,
        "dispatch": "bf16" if d.exchange == COLLECTIVE else how.dispatch or "bf16",
        "combine": "bf16" if d.exchange == COLLECTIVE else how.combine or "bf16",
        "drafts": d.drafts,
        "overlap": d.overlap,
        "balance": d.balance,
    }


def gives(plan: Plan) -> dict[str, float]:
    d, found = plan.service.decode, plan.outcome
    slots = (d.model.n_routed_experts + d.redundant) / d.ranks
    return {
        "cards": plan.cards,
        "tokens_per_s": found.tokens,
        "tokens_per_s_per_card": plan.tokens_per_card,
        "tokens_per_s_per_user": 1 / found.tpot,
        "tpot_ms": found.tpot * 1e3,
        "ttft_ms": found.ttft * 1e3,
        "requests_per_s": found.tokens / plan.work.output,
        "requests_in_flight": plan.in_flight,
        "requests_per_group": found.batch,
        "requests_per_group_in_memory": plan.most_batch,
        "tokens_per_step": accepted_tokens(d),
        "rows_per_rank": found.step.rows,
        "rows_per_expert": found.step.rows * d.model.num_experts_per_tok / slots,
        "prefill_use": found.prefill_use,
    }


def limited_by(plan: Plan, limits: Limits) -> list[str]:
    """What keeps more requests from being served."""
    found, out = plan.outcome, []
    if found.tpot > CLOSE * limits.tpot:
        out.append("the limit on TPOT")
    if plan.mode == "apart" and found.prefill_use > CLOSE * MOST_USE:
        out.append("prefill, which is busy")
    if found.ttft > CLOSE * limits.ttft:
        out.append("the limit on TTFT")
    if found.batch + 1 > plan.most_batch:
        out.append("memory for the cache")
    return out or ["prefill, whose queue must hold TTFT" if plan.mode == "apart" else "the sizes of batches"]


def memory(plan: Plan) -> dict[str, float]:
    """Of one rank that decodes: weights by kind, cache, rows of the largest step, reserved, free."""
    d, batch = plan.service.decode, plan.outcome.batch
    rows = max(batch * (1 + d.drafts) / d.topology.tp, prefill_rows(d, plan.mode))
    return _memory(d, batch * plan.work.context * cache_bytes(d), workspace_bytes(d, rows))


def prefill_memory(d: Deployment, length: float) -> dict[str, float]:
    """Of one rank that prefills only: the cache of the prompts of a step."""
    rows = chunk(d) / d.topology.tp
    return _memory(d, prompts_of_a_step(d, length) * cache_bytes(d), workspace_bytes(d, rows))


def _memory(d: Deployment, cache: float, workspace: float) -> dict[str, float]:
    sizes = {kind: float(size) for kind, size in static_memory(d).most_common() if size}
    sizes |= {"cache": cache, "rows of a step": workspace, "reserved": RESERVED * d.card.memory_gb * 1e9}
    free = d.card.memory_gb * 1e9 - sum(sizes.values())
    return {kind: size / 1e9 for kind, size in (sizes | {"free": free}).items()}


def traffic(d: Deployment) -> dict[str, float]:
    """Bytes that cross nodes for one token in one layer, there and back."""
    if d.domains == 1 or not d.model.moe_layers:
        return {"dispatch_bytes": 0.0, "combine_bytes": 0.0}
    if collects(d):  # each row goes to all other nodes, and a sum comes from each
        size = 2.0 * d.model.hidden_size * (d.domains - 1)
        return {"dispatch_bytes": size, "combine_bytes": size}
    return {
        "dispatch_bytes": crossing_bytes(d, "dispatch"),
        "combine_bytes": crossing_bytes(d, "combine"),
    }


def unevenness(d: Deployment, rows: float, p: Parameters) -> dict[str, float]:
    """Rows of the fullest rank over the mean: over many steps, and in one, where chance adds to it."""
    if d.ranks == 1 or not d.model.moe_layers:
        return {"lasting": 1.0, "one_step": 1.0}
    return {
        "lasting": systematic(d, p),
        "one_step": imbalance(d, rows * d.model.num_experts_per_tok, p),
    }


def step(found: Step) -> dict[str, Any]:
    """Time of a step by part, all layers; of_floor: the share of it that the resources would need at their peak."""
    return {
        "ms": found.seconds * 1e3,
        "floor_ms": found.floor * 1e3,
        "of_floor": found.floor / found.seconds,
        "bound": found.bound,
        "hidden_ms": (sum(part.seconds for part in found.parts) - found.seconds) * 1e3,
        "parts": [
            {
                "name": part.name,
                "ms": part.seconds * 1e3,
                "floor_ms": part.floor * 1e3,
                "of_floor": part.floor / part.seconds if part.seconds else 1.0,
                "bound": part.bound,
                "travels": part.travels,
            }
            for part in found.parts
        ],
    }
