"""What a rank holds: its weights, and the cache beside them, settled before anything is loaded."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from expertmesh.config import EngineConfig, cache_bytes_per_token
from expertmesh.device import Room
from expertmesh.engine.checkpoint import Checkpoint, check_memory
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels
from expertmesh.mesh.layout import Layout
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.layers import Made, New
from expertmesh.weights import Shard, expert_bytes, moves_experts, static_bytes

MOST_RANKS = 1024
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Memory:
    """Static memory of one rank, in bytes. weights: by kind (`weights.Kind`); together: of all ranks of this machine,
    where ranks may share."""

    kinds: Counter[str]
    cache: int
    together: int

    @property
    def weights(self) -> int:
        return sum(self.kinds.values())


def check_sharing(ranks: int) -> None:
    """InputError where a machine cannot have so many."""
    if ranks > MOST_RANKS:
        raise InputError(f"{ranks} ranks on one machine; at most {MOST_RANKS} are possible")


def resolve_memory(
    checkpoint: Checkpoint,
    config: EngineConfig,
    layout: Layout,
    kernels: Kernels,
    room: Room,
    sharing: int,
    together: bool,
) -> tuple[EngineConfig, Memory]:
    """Settle the size of the caches, before anything is loaded. room: of the device, to which those of others are taken
    to be alike; sharing: how many ranks share it; together: whether they also share what is the same. InputError where
    the model does not fit in."""
    model, topology = checkpoint.config, layout.topology
    config = config.paged(kernels.page, kernels.page_sizes)
    dtype = config.dtype_of(model)
    shards = shards_of(layout, config)
    config.check_precision(model)
    config = replace(config, quantise=config.quantise_of(model))
    precision, packed = kernels.precision(config.quantise), kernels.graph is not None
    kinds = static_bytes(model, dtype, shards[0], precision, packed=packed)  # all ranks have as many slots
    if moves_experts(model, topology, config.rebalance):
        kinds["spare"] = expert_bytes(model, dtype, precision, packed)
    config = config.within(model, sum(kinds.values()))
    weights = sum(kinds.values()) * sharing
    if together:
        made: dict[Hashable, Made] = {}
        for shard in shards:
            DeepSeek(model, shard, kernels, new_weights(config, dtype, "meta", kernels, made))
        weights = sum(t.nbytes for t in made.values()) + kinds["spare"] * topology.ranks
    check_memory(checkpoint.folder, weights, room.free)
    free = room.free - weights
    resolved = config.resolve(model, max(0, free - room.reserve), sharing, room.dedicated)
    cache = (resolved.cache_tokens or 0) * cache_bytes_per_token(model, dtype)
    if cache * sharing > free:
        raise InputError(
            f"a cache of {resolved.cache_tokens} tokens takes {cache * sharing / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free beside the weights; lower cache_tokens or page_size"
        )
    return resolved, Memory(kinds, cache, weights)


def new_weights(
    config: EngineConfig,
    dtype: str,
    device: torch.device | str,
    kernels: Kernels,
    made: dict[Hashable, Made] | None = None,
) -> New:
    """What makes a model's weights as the configuration wants them; made: what ranks of one process share."""
    precision = kernels.precision(config.quantise)
    return New(TORCH_DTYPES[dtype], torch.device(device), kernels, made, precision)


def shards_of(layout: Layout, config: EngineConfig) -> list[Shard]:
    """What each rank holds. Experts that may move are a rank's own, also where another one begins with the same."""
    shards = [Shard.of(rank, layout.topology, layout.placement) for rank in range(layout.topology.ranks)]
    if config.rebalance == "off":
        return shards
    return [replace(shard, own=rank) for rank, shard in enumerate(shards)]
