"""How one model lies on a cluster: all that ranks agree on before they start."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expertmesh.config import ModelConfig
from expertmesh.mesh.placement import Placement, default_placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import Algorithm, algorithm, check_choices


@dataclass(frozen=True)
class Layout:
    """topology is resolved."""

    topology: Topology
    placement: Placement
    how: Algorithm

    @staticmethod
    def of(model: ModelConfig, topology: Topology, exchange: str, redundant: int) -> "Layout":
        """The layout without any loads known. InputError where the model does not fit the cluster."""
        resolved = topology.resolve(model)
        if resolved.ranks > 1 and model.moe_layers:
            check_choices(model.num_experts_per_tok)
        placement = default_placement(model.n_routed_experts, model.moe_layers, resolved, redundant)
        return Layout(resolved, placement, algorithm(exchange, native=True))

    def to_plain(self) -> dict[str, Any]:
        """As plain data, for other processes."""
        p = self.placement
        placement = {"slots": p.slots_LRS.tolist(), "experts": p.experts, "layers": list(p.layers)}
        placement["slots_per_rank"] = p.slots_per_rank
        return {"topology": asdict(self.topology), "placement": placement, "how": self.how.name}

    @staticmethod
    def from_plain(data: dict[str, Any]) -> "Layout":
        p, topology = data["placement"], Topology(**data["topology"])
        # A model without experts has no layers here to see the shape from.
        shape = (len(p["layers"]), topology.ranks, p["slots_per_rank"])
        slots = np.array(p["slots"], dtype=np.int64).reshape(shape)
        placement = Placement(slots, p["experts"], tuple(p["layers"]))
        return Layout(topology, placement, algorithm(data["how"], native=True))
