"""Plans judged by loads of experts that were recorded, instead of the usual skew."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from expertmesh.mesh.loads import Loads
from expertmesh.mesh.topology import Topology
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.imbalance import measured
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.plans import Limits, Plan, fitted
from expertmesh.planner.serving import Service

LAYERS = 4  # of the record, evenly spaced, for each of which a placement is sought
WINDOWS = 8
JUDGED = 4  # plans, each as it is and with a slot more for replicas on every rank


def judged(plans: Sequence[Plan], loads: Loads, limits: Limits, p: Parameters | None = None) -> list[Plan]:
    """The best plans with experts placed by these loads, most tokens first. A placement takes a second or so."""
    sample, known = _sample(loads), dict[tuple[Topology, int], float]()

    def by_loads(d: Deployment) -> Deployment:
        if d.ranks == 1 or not d.model.moe_layers:
            return d
        key = (replace(d.topology, attention_tp=None), d.redundant)
        if key not in known:
            known[key] = max(1.0, measured(sample, *key))
        return replace(d, imbalance=known[key])

    found = []
    for plan in plans[:JUDGED]:
        other = plan.service.prefill and by_loads(plan.service.prefill)
        for d in _with_replicas(plan.service.decode):
            service: Service = replace(plan.service, decode=by_loads(d), prefill=other)
            found.append(fitted(service, plan.mode, plan.work, limits, p))
    return sorted(filter(None, found), key=lambda plan: -plan.outcome.tokens)


def _with_replicas(d: Deployment) -> Iterator[Deployment]:
    yield d
    if d.ranks > 1 and d.redundant + d.ranks <= d.model.n_routed_experts * (d.ranks - 1):
        yield replace(d, redundant=d.redundant + d.ranks)


def _sample(loads: Loads) -> Loads:
    """Few layers and windows of it."""
    few = loads.merged(WINDOWS)
    rows = np.unique(np.linspace(0, len(few.layers) - 1, LAYERS).round().astype(int))
    tokens = None if few.tokens_LTK is None else few.tokens_LTK[rows]
    layers = tuple(few.layers[row] for row in rows)
    return Loads(few.counts_WLE[:, rows], few.weights_W, layers, tokens, few.groups, few.rows)
