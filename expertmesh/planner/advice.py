"""What would help next: single changes of what was given, each with its gain by the model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias

from expertmesh.planner.cards import Card
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.plans import Limits, Plan, fitted
from expertmesh.planner.serving import Service, Workload
from expertmesh.planner.space import Mode, byte_format

MORE = 1.2  # of what is given
FINALISTS = 10  # layouts of which the best is taken anew: another one may fit what was changed
Change: TypeAlias = Callable[[Deployment], Deployment]


@dataclass(frozen=True)
class Advice:
    """gain: of output tokens/s of all cards, a ratio - 1; per_card: the same of each card; cards: of the new plan."""

    change: str
    gain: float
    per_card: float
    tpot_ms: float
    ttft_ms: float
    cards: float


def advise(plans: Sequence[Plan], limits: Limits, p: Parameters | None = None) -> list[Advice]:
    """Changes that help, the best first. plans: the best ones, the first of which is to be improved."""
    if not plans:
        return []
    best, found = plans[0], []
    for change, services, work, wider in _changes(plans[:FINALISTS], limits):
        new = [fitted(service, mode, work, wider, p) for service, mode in services]
        better = max((n for n in new if n), key=lambda n: n.outcome.tokens, default=None)
        if better is None:
            continue
        gain = better.outcome.tokens / best.outcome.tokens - 1
        per_card = better.tokens_per_card / best.tokens_per_card - 1
        found.append(
            Advice(change, gain, per_card, better.outcome.tpot * 1e3, better.outcome.ttft * 1e3, better.cards)
        )
    return sorted((a for a in found if a.gain > 0.005), key=lambda a: -a.gain)


def _changes(
    plans: Sequence[Plan], limits: Limits
) -> Iterator[tuple[str, list[tuple[Service, Mode]], Workload, Limits]]:
    """(what, services, requests, limits) of each."""
    best, work = plans[0], plans[0].work
    as_is = [(plan.service, plan.mode) for plan in plans]
    percent = f"{round(100 * (MORE - 1))}%"
    if limits.tpot < inf:
        wider = replace(limits, tpot=limits.tpot * MORE)
        yield f"TPOT {percent} higher ({wider.tpot * 1e3:.0f} ms)", as_is, work, wider
    if limits.ttft < inf:
        wider = replace(limits, ttft=limits.ttft * MORE)
        yield f"TTFT {percent} higher ({wider.ttft * 1e3:.0f} ms)", as_is, work, wider
    if best.mode != "elsewhere" and work.cached < work.input / 2:
        hits = replace(work, cached=work.input / 2)
        yield "half of each prompt found in the prefix cache", as_is, hits, limits
    for what, names in HARDWARE.items():
        yield f"{what} {percent} more", _all(as_is, _card(names, MORE)), work, limits
    starts = "starts of kernels and exchanges in half the time"
    yield starts, _all(as_is, _card(("launch_us", "dispatch_us", "combine_us", "peer_us"), 0.5)), work, limits
    for what, change in _choices(best.service.decode):
        yield what, _all(as_is, change), work, limits
    ranks = max(plan.service.decode.topology.cards_per_node for plan in plans)
    grown = [(service, plan.mode) for plan in plans for service in one_more_node(plan.service, ranks)]
    yield "one more node", grown, work, limits


HARDWARE = {
    "memory bandwidth": ("memory_gbs",),
    "memory size": ("memory_gb",),
    "compute": ("bf16_tflops", "fp8_tflops", "int8_tflops", "fp4_tflops"),
    "bandwidth inside a node": ("node_gbs", "bulk_gbs"),
    "bandwidth between nodes": ("across_gbs",),
}


def _card(names: Sequence[str], factor: float) -> Change:
    def changed(card: Card) -> Card:
        return replace(card, **{name: getattr(card, name) * factor for name in names})

    return lambda d: replace(d, card=changed(d.card))


def _choices(d: Deployment) -> Iterator[tuple[str, Change]]:
    """What a search leaves out by default, or what may have been pinned."""
    small = byte_format(d.card)
    four = "fp4" if d.card.fp4_tflops else "w4a8" if d.card.int8_tflops else "experts_int4"
    if d.weight_precision not in ("fp4", "w4a8", "experts_int4"):
        yield f"{four} weights of experts, if the model bears it", lambda d: replace(d, weight_precision=four)
    if d.cache_precision == "bf16":
        yield f"a cache in {small}", lambda d: replace(d, cache_precision=small)
    if d.how.dispatch is None or d.how.combine is None:
        yield (
            f"rows in {small}, to experts and back",
            lambda d: replace(d, exchange=_plain(d), dispatch=small, combine=small),
        )
    if not d.drafts and d.model.num_nextn_predict_layers:
        yield "one MTP draft", lambda d: replace(d, drafts=1)
    if not d.overlap and d.ranks > 1:
        yield "overlap of two micro-batches", lambda d: replace(d, overlap=True)
    if d.balance != "perfect":
        yield "experts in perfect balance", lambda d: replace(d, balance="perfect", imbalance=None)


def _plain(d: Deployment) -> str:
    return "flat" if d.exchange == "flat" else "two_tier"


def _all(services: Sequence[tuple[Service, Mode]], change: Change) -> list[tuple[Service, Mode]]:
    out = []
    for service, mode in services:
        other = service.prefill and change(replace(service.prefill, drafts=0, accepted=None))
        other = other and replace(other, drafts=0)
        out.append((replace(service, decode=change(service.decode), prefill=other), mode))
    return out


def one_more_node(service: Service, per_node: int) -> Iterator[Service]:
    """For decoding, or for prefill where that is apart: one more instance where these have a node each, one that is
    larger by a node where there is only one."""
    for decode, instances in _grown(service.decode, service.instances, per_node):
        yield replace(service, decode=decode, instances=instances)
    if service.prefill is not None:
        for prefill, instances in _grown(service.prefill, service.prefill_instances, per_node):
            yield replace(service, prefill=prefill, prefill_instances=instances)


def _grown(d: Deployment, instances: int, per_node: int) -> Iterator[tuple[Deployment, int]]:
    topology, experts = d.topology, d.model.n_routed_experts
    if topology.cards_per_node != per_node:
        return
    if topology.nodes == 1:
        yield d, instances + 1
    if instances == 1:
        ranks = topology.ranks + per_node
        spare = d.slots - -(-experts // d.ranks)  # slots of a rank, as many as before
        redundant = -experts % ranks + spare * ranks if d.model.moe_layers else 0
        yield replace(d, topology=replace(topology, nodes=topology.nodes + 1), redundant=redundant), 1
