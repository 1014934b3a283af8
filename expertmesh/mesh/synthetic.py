"""Loads of DeepSeek-V3's size that nobody recorded: related workloads, as far from each other as recorded ones are."""

import numpy as np

from expertmesh.mesh.loads import Floats, Loads

LAYERS, EXPERTS, GROUPS, CHOICES = 58, 256, 8, 8  # DeepSeek-V3
RECORDED = 1_000_000  # tokens of a workload
# How far each workload is from the first one. part: of another workload in it; deviation: of the logarithm.
KINDS = {
    "first": (0.0, 0.0),
    "same": (0.0, 0.05),
    "neighbour": (0.0, 0.25),
    "far": (0.5, 0.25),
    "phase": (0.0, 0.7),
}


def synthetic(layers: int = LAYERS, seed: int = 0) -> dict[str, Loads]:
    """Related workloads, by `KINDS`: experts by a power law, groups of them more and less popular."""
    rng = np.random.default_rng(seed)

    def popular() -> Floats:
        ranks_E = np.arange(1, EXPERTS + 1) ** -0.5
        group_LE = np.repeat(rng.lognormal(0, 0.2, (layers, GROUPS)), EXPERTS // GROUPS, axis=1)
        return np.stack([rng.permutation(ranks_E) for _ in range(layers)]) * group_LE

    base_LE, other_LE = popular(), popular()
    found = {}
    for name, (part, deviation) in KINDS.items():
        mixed_LE = base_LE ** (1 - part) * other_LE**part * rng.lognormal(0, deviation, base_LE.shape)
        counts_LE = np.rint(mixed_LE / mixed_LE.sum(1, keepdims=True) * RECORDED * CHOICES)
        found[name] = Loads.of(counts_LE.astype(np.int64), groups=GROUPS)
    return found
