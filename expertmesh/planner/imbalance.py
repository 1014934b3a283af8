"""How much fuller the fullest rank is than the mean: for as long as loads last, and by chance in one step."""

from functools import lru_cache
from math import exp, log, sqrt

from expertmesh.mesh.balance import balance
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.split import level
from expertmesh.mesh.topology import Topology
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.parameters import Parameters


@lru_cache
def highest(count: int) -> float:
    """Expected largest of so many standard normal numbers, nearly (Blom 1958)."""
    if count < 2:
        return 0.0
    t = sqrt(-2 * log(0.625 / (count + 0.25)))  # then the inverse normal, Abramowitz and Stegun 26.2.23
    top = 2.515517 + 0.802853 * t + 0.010328 * t * t
    return max(0.0, t - top / (1 + 1.432788 * t + 0.189269 * t * t + 0.001308 * t**3))


def systematic(deployment: Deployment, p: Parameters) -> float:
    """Max/mean of rows over ranks, in the long run."""
    if deployment.imbalance is not None:
        return deployment.imbalance
    if deployment.expert_split == "tensor":
        return 1.0
    left = {"none": 1.0, "known": p.skew_left, "perfect": 0.0}[deployment.balance]
    spread = p.skew * left / sqrt(max(deployment.slots, 1))
    return float(min(1 + spread * highest(deployment.ranks), deployment.ranks))


def noise(rows: float, ranks: int) -> float:
    """Max/mean in a step where each rank gets so many rows by chance: multinomial."""
    return float(min(1 + highest(ranks) / sqrt(max(rows, 1e-9)), ranks))


def imbalance(deployment: Deployment, rows: float, p: Parameters) -> float:
    """Max/mean of one step, rows: mean over the ranks. Deviations add up as those of independent things."""
    even = deployment.expert_split == "tensor" or deployment.balance == "perfect"
    chance = 1.0 if even else noise(rows, deployment.ranks)
    lasting = systematic(deployment, p)
    return float(min(1 + sqrt((lasting - 1) ** 2 + (chance - 1) ** 2), deployment.ranks))


def used(deployment: Deployment, rows: float, p: Parameters) -> float:
    """Share of the slots of a layer that get any of a step's rows, `rows` being the mean of a slot. Experts' loads have
    a gamma distribution of the skew's spread, so that the rows of each are negative binomial."""
    spread = 0.0 if deployment.balance == "perfect" else p.skew**2
    return 1 - (exp(-rows) if spread == 0 else (1 + rows * spread) ** (-1 / spread))


def busiest(slots: float, share: float, ranks: int) -> float:
    """Slots with any row of the rank that has most of these, each having some with this probability."""
    return min(slots, slots * share + highest(ranks) * sqrt(slots * share * (1 - share)))


def measured(
    loads: Loads,
    topology: Topology,
    redundant: int = 0,
    later: Loads | None = None,
    objective: str = "robust",
) -> float:
    """Max/mean over ranks, the mean of the layers, of experts placed by these loads (`mesh.balance`) and used as in
    `later`, None for the same; each step's rows are split over replicas (`mesh.split`). For `Deployment.imbalance`."""
    placement = balance(loads, topology, redundant, objective=objective)
    then = later or loads
    found = []
    for row, layer in enumerate(then.layers):
        slots_RS = placement.slots_LRS[placement.row_of(layer)]
        load_R = level(slots_RS, then.total_LE[row][None])[0]
        found.append(float(load_R.max() / load_R.mean()))
    return sum(found) / len(found)
