"""How many other nodes a token's experts are on: estimated from loads, with tokens as a gate like DeepSeek-V3's would
choose them."""

from dataclasses import dataclass

import numpy as np

from expertmesh import native
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.placement import EMPTY, Ints, Placement
from expertmesh.mesh.split import Split
from expertmesh.mesh.topology import Topology

ROUNDS = 12  # in which the biases of the gate are fitted
ENOUGH = 1024  # recorded tokens, to be worth more than any number of a gate's
ROWS = 32  # of each rank in the simulated step


@dataclass(frozen=True)
class Gate:
    """Experts in groups, of which a token may use the best `top_groups`, and in these `chosen` experts (DeepSeek-V3,
    section 2.1.2)."""

    groups: int = 1
    top_groups: int = 1
    chosen: int = 8

    @classmethod
    def of(cls, experts: int, groups: int | None = None) -> "Gate":
        """A token uses half of the groups and 8 experts, as in DeepSeek-V3, which the loads do not tell: nor do they
        the groups, which are taken to be 8 of 256 experts, else none."""
        groups = groups or (8 if experts == 256 else 1)
        top_groups = -(-groups // 2)
        return cls(groups, top_groups, min(8, experts // groups * top_groups))

    def sample(self, shares_E: Floats, tokens: int, seed: int = 0) -> Ints:
        """Experts [tokens, chosen] that come out in these shares, nearly."""
        if not native.available("balance"):  # without groups
            rng = np.random.default_rng(seed)
            score = np.log(shares_E / shares_E.sum() + 1e-9) + rng.gumbel(size=(tokens, len(shares_E)))
            return np.argsort(-score, axis=1)[:, : self.chosen]
        shares = np.ascontiguousarray(shares_E, np.float64)
        out = np.empty((tokens, self.chosen), np.int32)
        native.library("balance").gate(
            len(shares), self.groups, self.top_groups, self.chosen, native.pointer(shares), tokens, ROUNDS,
            native.unsigned(seed), native.pointer(out),
        )  # fmt: skip
        return out.astype(np.int64)


def copies_to_nodes(split: Split, experts_RTK: Ints, tolerance: float = 0.0) -> float:
    """Copies of a token to other nodes, a node counting once: the mean over one step with these rows."""
    topology, per_rank = split.topology, split.slots_RS.shape[1]
    wishes = [split.wish(experts_TK, rank) for rank, experts_TK in enumerate(experts_RTK)]
    counts_R2P = np.stack([wish.counts_2P for wish in wishes])
    total = 0
    for rank, wish in enumerate(wishes):
        slots_TK = split.assign(wish, rank, *split.settle(counts_R2P, rank, tolerance))
        nodes_TK = np.sort(slots_TK // (per_rank * topology.cards_per_node), axis=1)
        first = np.diff(nodes_TK, axis=1, prepend=-1) > 0
        total += int((first & (nodes_TK != topology.node_of(rank))).sum())
    return float(total / (experts_RTK.shape[0] * experts_RTK.shape[1]))


def sample(loads: Loads, row: int, tokens: int, seed: int = 0) -> Ints:
    """Experts [tokens, chosen] of one layer of the loads: recorded ones where there are enough, if need be several
    times, else such as a gate would choose that gives these loads."""
    if loads.tokens_LTK is not None:
        whole_TK = loads.tokens_LTK[row][(loads.tokens_LTK[row] != EMPTY).all(1)]
        if len(whole_TK) >= min(tokens, ENOUGH):
            few = len(whole_TK) < tokens
            chosen: Ints = np.random.default_rng(seed).choice(whole_TK, tokens, replace=few)
            return chosen
    return Gate.of(loads.experts, loads.groups).sample(loads.total_LE[row], tokens, seed)


def cross_node_copies(
    placement: Placement, loads: Loads, topology: Topology, tolerance: float = 0.0
) -> float:
    """Copies of a token to other nodes, a node counting once: the mean over the layers, in a step whose rows are split
    over the replicas."""
    if topology.nodes == 1:
        return 0.0
    found = []
    for row, layer in enumerate(loads.layers):
        tokens_TK = sample(loads, row, topology.ranks * ROWS, seed=1)
        split = Split(placement.slots_LRS[placement.row_of(layer)], placement.experts, topology)
        found.append(copies_to_nodes(split, tokens_TK.reshape(topology.ranks, ROWS, -1), tolerance))
    return float(np.mean(found))
