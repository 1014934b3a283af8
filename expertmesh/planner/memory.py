"""Memory of a rank: weights by the description that the loader reads, the latent cache, and what steps need."""

from collections import Counter
from functools import lru_cache

from expertmesh.config import ModelConfig
from expertmesh.config.precision import Precision
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.formats import CACHES
from expertmesh.weights import Shard, static_bytes

RESERVED = 0.08  # of a card's memory: of drivers, collectives, graphs and fragments
DECODING_ROWS = 128.0  # of a rank in a step, where nothing is said of it
WORKSPACE_TENSORS = 8  # as wide as the model, that a row of a step has alive


def static_memory(deployment: Deployment) -> Counter[str]:
    """Bytes of the weights of one rank, by kind; "mtp" where there are drafts."""
    d = deployment
    of = d.model, d.weights.precision, d.topology.tp, d.drafts > 0
    one, two = _static(*of, 1), _static(*of, 2)  # experts are all of a size
    return Counter({kind: size + (d.slots - 1) * (two[kind] - size) for kind, size in one.items()})


@lru_cache
def _static(model: ModelConfig, precision: Precision, tp: int, drafting: bool, slots: int) -> Counter[str]:
    layers = range(model.num_hidden_layers + model.num_nextn_predict_layers)
    shard = Shard(dict.fromkeys(layers, tuple(range(slots))), 0, tp)
    return static_bytes(model, "bfloat16", shard, precision, drafting)


def cache_bytes(deployment: Deployment) -> float:
    """Of one token on each rank of its TP group, all layers and an MTP layer where there are drafts."""
    model = deployment.model
    layers = model.num_hidden_layers + (deployment.drafts > 0)
    return layers * model.latent_dim * CACHES[deployment.cache_precision]


def workspace_bytes(deployment: Deployment, rows: float) -> float:
    """Of a step with so many rows of each rank."""
    model = deployment.model
    wide = model.hidden_size * WORKSPACE_TENSORS + model.num_experts_per_tok * model.hidden_size * 2
    return rows * wide * 2


def room(deployment: Deployment, rows: float = DECODING_ROWS) -> float:
    """Bytes of one rank that are left for the cache; below 0 where the weights do not fit."""
    capacity = deployment.card.memory_gb * 1e9 * (1 - RESERVED)
    return capacity - sum(static_memory(deployment).values()) - workspace_bytes(deployment, rows)


def most_requests(deployment: Deployment, context: float, rows: float = 0.0) -> float:
    """How many requests of a TP group fit, each with so many tokens in the cache; 0 where none does. rows: of each rank
    in the largest step of prefill between those of decoding, for which the same memory is kept."""
    per_request = max(context, 1.0) * cache_bytes(deployment)
    decoding = (1 + deployment.drafts) / deployment.topology.tp * workspace_bytes(deployment, 1)
    most = min(room(deployment, 0) // (per_request + decoding), room(deployment, rows) // per_request)
    return max(0.0, most)
