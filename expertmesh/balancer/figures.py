"""What a placement is worth: how evenly cards are loaded, and what crosses between nodes."""

from dataclasses import dataclass

import numpy as np

from expertmesh.mesh.loads import Floats
from expertmesh.mesh.placement import Ints, Placement
from expertmesh.mesh.topology import Topology


@dataclass(frozen=True, eq=False)
class Figures:
    """Of each layer: load of the fullest card, and fullest less emptiest, both in means over the cards."""

    max_over_mean_L: Floats
    spread_L: Floats

    @classmethod
    def of(cls, loads_LR: Floats) -> "Figures":
        """Layers without load are left out."""
        loads_LR = loads_LR[loads_LR.sum(axis=1) > 0]
        mean_L, most_L, least_L = loads_LR.mean(axis=1), loads_LR.max(axis=1), loads_LR.min(axis=1)
        return cls(most_L / mean_L, (most_L - least_L) / mean_L)

    def means(self) -> dict[str, float]:
        """Over the layers."""
        return {
            "mean_max_over_mean": float(self.max_over_mean_L.mean()),
            "mean_spread": float(self.spread_L.mean()),
        }


def node_traffic(placement: Placement, counts_LE: Floats, topology: Topology) -> Floats:
    """[sending node, receiving node]: share of all token rows, over all layers, that go from one to the other, each row
    to each of its experts by itself. Tokens start evenly on all nodes; the replicas of an expert serve equally many,
    those of their own node first."""
    nodes = topology.nodes
    supply_LEN = replicas_on(placement.slots_LRS, placement.experts, nodes)
    supply_LEN /= supply_LEN.sum(axis=2, keepdims=True)
    own_LEN = np.minimum(supply_LEN, 1 / nodes)
    left_LEN, wanted_LEN = supply_LEN - own_LEN, 1 / nodes - own_LEN
    scale_LE = counts_LE / np.maximum(left_LEN.sum(axis=2), 1e-30)
    traffic_NN: Floats = np.einsum("len,lem,le->nm", wanted_LEN, left_LEN, scale_LE, optimize=True)
    traffic_NN = traffic_NN + np.diag(np.einsum("len,le->n", own_LEN, counts_LE))
    traffic_NN /= traffic_NN.sum()
    return traffic_NN


def replicas_on(slots_LRS: Ints, experts: int, nodes: int) -> Floats:
    """[layers, experts, nodes]: how many slots an expert has on each node."""
    layers, ranks, _ = slots_LRS.shape
    out = np.zeros((layers, experts + 1, nodes))  # the last one counts empty slots
    node_R = np.arange(ranks) * nodes // ranks
    np.add.at(out, (np.arange(layers)[:, None, None], slots_LRS, node_R[:, None]), 1.0)
    return out[:, :experts]
