"""Placements as they are compared: ours, EPLB's, experts in order; how long they took, and what they are worth."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from expertmesh.balancer.eplb import eplb_slots, slot_loads, without_twins
from expertmesh.balancer.figures import Figures
from expertmesh.mesh.balance import even_cards, split_cards
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.placement import Ints, Placement, default_placement
from expertmesh.mesh.topology import Topology


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement, and how long it took to find. raw_LRS: its slots as they were found, where these have an expert on a
    card twice."""

    placement: Placement
    seconds: float
    raw_LRS: Ints | None = None

    def even(self, counts_LE: Floats) -> Floats:
        """[layers, ranks]: loads of the cards, where the slots of an expert share its rows evenly."""
        if self.raw_LRS is None:
            return even_cards(self.placement, counts_LE)
        return slot_loads(self.raw_LRS, counts_LE)

    def judged(self, loads: Loads) -> dict[str, dict[str, float]]:
        """Under these loads, with rows split anew at each step and with even shares."""
        counts_LE = loads.total_of(self.placement.layers)
        return {
            "split": Figures.of(split_cards(self.placement, counts_LE)).means(),
            "even": Figures.of(self.even(counts_LE)).means(),
        }


def timed(make: Callable[[], Placement]) -> Plan:
    start = time.perf_counter()
    placement = make()
    return Plan(placement, time.perf_counter() - start)


def in_order(loads: Loads, topology: Topology) -> Plan:
    """Without replicas."""
    return timed(lambda: default_placement(loads.experts, loads.layers, topology))


def published(loads: Loads, topology: Topology, redundant: int, groups: int | None = None) -> Plan:
    """As EPLB gives it, which may have two slots of an expert on a card; arguments and errors of `eplb_slots`."""
    start = time.perf_counter()
    slots_LRS = eplb_slots(loads.total_LE, topology, redundant, groups)
    seconds = time.perf_counter() - start
    return Plan(Placement(without_twins(slots_LRS), loads.experts, loads.layers), seconds, slots_LRS)
