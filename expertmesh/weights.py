"""The weights of a model, described as data before they exist: name, shape, type, what they are, how they split.

The loader reads by this description, and whoever counts memory counts it here: there is no second list of tensors.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from expertmesh.config import ModelConfig
from expertmesh.config.precision import PLAIN, Format, MatrixKind, Precision
from expertmesh.errors import InputError
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology

Kind = Literal["embedding", "attention", "dense", "router", "shared", "routed", "norm", "mtp"]
DTYPE_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a checkpoint.

    split: the axis that a TP group splits, None where every rank holds the whole. expert: the routed expert that it
    belongs to, held by the ranks that serve that expert. layer: None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    layer: int | None = None
    split: int | None = None
    expert: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def matrix_kind(self) -> MatrixKind | None:
        """Of what may be quantised."""
        if len(self.shape) != 2 or self.kind not in ("attention", "dense", "shared", "routed"):
            return None
        if "kv_b_proj" in self.name:
            return None
        if self.kind == "attention" and "o_proj" not in self.name:
            return "prologue"
        return "experts" if self.kind == "routed" else "linear"

    @property
    def is_product(self) -> bool:
        """Whether rows are multiplied with it in the model's type: kernels may keep it in an order of their own."""
        return self.matrix_kind is not None or self.name.endswith(("kv_b_proj.weight", "lm_head.weight"))


def describe(config: ModelConfig) -> list[Weight]:
    """Every tensor of the official checkpoint of this model, in the order of the layers.

    The MTP layers (DeepSeek-V3, section 2.2) follow the main ones, with their own copies of embedding and head.
    """
    return list(_model(config))


def _model(c: ModelConfig) -> Iterator[Weight]:
    yield Weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), _plain(c), "embedding", split=0)
    for layer in range(c.num_hidden_layers):
        yield from _layer(c, layer)
    yield Weight("model.norm.weight", (c.hidden_size,), _plain(c), "norm")
    if not c.tie_word_embeddings:
        yield Weight("lm_head.weight", (c.vocab_size, c.hidden_size), _plain(c), "embedding", split=0)
    for layer in range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers):
        yield from _mtp_layer(c, layer)


def _plain(c: ModelConfig) -> str:
    """Type of what is never quantised."""
    return c.dtype if c.fp8_block is None else "bfloat16"


def _linear(
    c: ModelConfig, name: str, rows: int, columns: int, kind: Kind, layer: int, split: int | None = None,
    expert: int | None = None,
) -> Iterator[Weight]:  # fmt: skip
    """A matrix [rows, columns] and, in an FP8 checkpoint, the scales of its blocks."""
    dtype = c.dtype if c.fp8_block is None else "float8_e4m3fn"
    yield Weight(f"{name}.weight", (rows, columns), dtype, kind, layer, split, expert)
    if c.fp8_block is not None:
        blocks = (-(-rows // c.fp8_block[0]), -(-columns // c.fp8_block[1]))
        yield Weight(f"{name}.weight_scale_inv", blocks, "float32", kind, layer, split, expert)


def _layer(c: ModelConfig, layer: int) -> Iterator[Weight]:
    prefix = f"model.layers.{layer}"
    yield from _attention(c, f"{prefix}.self_attn", layer)
    if c.is_moe(layer):
        yield from _moe(c, f"{prefix}.mlp", layer)
    else:
        yield from _ffn(c, f"{prefix}.mlp", c.intermediate_size, "dense", layer, split=True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Weight(f"{prefix}.{norm}.weight", (c.hidden_size,), _plain(c), "norm", layer)


def _attention(c: ModelConfig, prefix: str, layer: int) -> Iterator[Weight]:
    heads, hidden = c.num_attention_heads, c.hidden_size

    def linear(
        name: str, rows: int, columns: int, split: int | None = None, bias: bool = False
    ) -> Iterator[Weight]:
        yield from _linear(c, f"{prefix}.{name}", rows, columns, "attention", layer, split)
        if bias and c.attention_bias:
            yield Weight(f"{prefix}.{name}.bias", (rows,), _plain(c), "attention", layer)

    if c.q_lora_rank is None:
        yield from linear("q_proj", heads * c.qk_head_dim, hidden, split=0)
    else:
        yield from linear("q_a_proj", c.q_lora_rank, hidden, bias=True)
        yield Weight(f"{prefix}.q_a_layernorm.weight", (c.q_lora_rank,), _plain(c), "norm", layer)
        yield from linear("q_b_proj", heads * c.qk_head_dim, c.q_lora_rank, split=0)
    yield from linear("kv_a_proj_with_mqa", c.latent_dim, hidden, bias=True)
    yield Weight(f"{prefix}.kv_a_layernorm.weight", (c.kv_lora_rank,), _plain(c), "norm", layer)
    yield from linear("kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, split=0)
    yield from linear("o_proj", hidden, heads * c.v_head_dim, split=1, bias=True)


def _ffn(
    c: ModelConfig,
    prefix: str,
    width: int,
    kind: Kind,
    layer: int,
    split: bool = False,
    expert: int | None = None,
) -> Iterator[Weight]:
    up, down = (0, 1) if split else (None, None)
    yield from _linear(c, f"{prefix}.gate_proj", width, c.hidden_size, kind, layer, up, expert)
    yield from _linear(c, f"{prefix}.up_proj", width, c.hidden_size, kind, layer, up, expert)
    yield from _linear(c, f"{prefix}.down_proj", c.hidden_size, width, kind, layer, down, expert)


def _moe(c: ModelConfig, prefix: str, layer: int) -> Iterator[Weight]:
    experts = c.n_routed_experts
    yield Weight(f"{prefix}.gate.weight", (experts, c.hidden_size), _plain(c), "router", layer)
    if c.topk_method == "noaux_tc":
        yield Weight(f"{prefix}.gate.e_score_correction_bias", (experts,), "float32", "router", layer)
    for expert in range(experts):
        name = f"{prefix}.experts.{expert}"
        yield from _ffn(c, name, c.moe_intermediate_size, "routed", layer, expert=expert)
    if c.n_shared_experts:
        width = c.moe_intermediate_size * c.n_shared_experts
        yield from _ffn(c, f"{prefix}.shared_experts", width, "shared", layer)


def _mtp_layer(c: ModelConfig, layer: int) -> Iterator[Weight]:
    prefix, hidden = f"model.layers.{layer}", c.hidden_size
    yield Weight(f"{prefix}.embed_tokens.weight", (c.vocab_size, hidden), _plain(c), "mtp", layer, split=0)
    for norm in ("enorm", "hnorm"):
        yield Weight(f"{prefix}.{norm}.weight", (hidden,), _plain(c), "mtp", layer)
    yield Weight(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), _plain(c), "mtp", layer)
    yield from _layer(c, layer)
    yield Weight(f"{prefix}.shared_head.norm.weight", (hidden,), _plain(c), "mtp", layer)
    yield Weight(
        f"{prefix}.shared_head.head.weight", (c.vocab_size, hidden), _plain(c), "mtp", layer, split=0
    )


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a model: its share of the TP group's split axes, and its slots of routed experts.

    slots: for each layer with routed experts, the expert in each of the rank's slots (-1: empty).
    own: the rank, where its experts are never shared with other ranks of the process, for they may be replaced.
    """

    slots: dict[int, tuple[int, ...]]
    tp_rank: int = 0
    tp_size: int = 1
    own: int | None = None

    @staticmethod
    def whole(config: ModelConfig) -> "Shard":
        """Everything, for an engine of one rank."""
        every = tuple(range(config.n_routed_experts))
        return Shard(dict.fromkeys(config.moe_layers, every))

    @staticmethod
    def of(rank: int, topology: Topology, placement: Placement) -> "Shard":
        """What this rank of a cluster holds."""
        return Shard(placement.of_rank(rank), topology.tp_rank(rank), topology.tp)

    def part(self, size: int, what: str) -> range:
        """My range of an axis of this size."""
        if size % self.tp_size:
            raise InputError(f"{what} {size} does not divide by the TP group's size {self.tp_size}")
        share = size // self.tp_size
        return range(self.tp_rank * share, (self.tp_rank + 1) * share)


def static_bytes(
    config: ModelConfig,
    dtype: str,
    shard: Shard,
    quantise: str | Precision = "none",
    drafting: bool = False,
    packed: bool = False,
) -> Counter[str]:
    """Bytes of the weights that one rank holds, by kind, computed in `dtype`: the formula of the engine's own memory.

    Routers are kept in float32, FP8 blocks are expanded unless they are to be kept. A slot without an expert takes as
    much as one with. drafting: with the MTP layers, which this engine does not load, as kind "mtp"; they use the main
    model's embedding and head. packed: in the order of the CPU's own kernels, which fills up what does not divide;
    quantised matrices always are.
    """
    precision = Precision.of(quantise) if isinstance(quantise, str) else quantise
    counts: Counter[str] = Counter()
    for weight in _sizes(config):
        layer = weight.layer or 0
        drafts = layer >= config.num_hidden_layers
        if drafts and not drafting:
            continue
        size = _bytes(config, weight, dtype, shard.tp_size, precision, packed)
        if weight.kind == "routed":  # all experts are of one size
            size *= len(shard.slots[layer])
        counts["mtp" if drafts else weight.kind] += size
    return counts


@lru_cache
def _sizes(config: ModelConfig) -> tuple[Weight, ...]:
    """What takes memory: without scales of blocks, which are part of a format, with one routed expert of each layer,
    and without an MTP layer's copies of embedding and head."""
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    return tuple(
        w
        for w in describe(config)
        if not w.name.endswith("_scale_inv")
        and w.expert in (None, 0)
        and not (w.kind == "mtp" and w.name.endswith(copies))
    )


def _bytes(
    c: ModelConfig, weight: Weight, dtype: str, tp_size: int, precision: Precision, packed: bool
) -> int:
    """Of one rank's part of a tensor."""
    shape = [n // tp_size if axis == weight.split else n for axis, n in enumerate(weight.shape)]
    format = PLAIN
    if weight.matrix_kind is not None:
        format = precision.format(weight.matrix_kind, shape[1], weight.split == 1 and tp_size > 1)
    if format is not PLAIN or (packed and weight.is_product):
        return _packed_bytes(c, weight, shape[0], shape[1], format)
    return prod(shape) * (4 if weight.kind == "router" else DTYPE_BYTES[dtype])


def _packed_bytes(c: ModelConfig, weight: Weight, rows: int, columns: int, format: Format) -> int:
    """As the model's modules pack it: heads apart from each other, the down-projections of attention as one matrix."""

    def size(rows: int, columns: int) -> int:
        return sum(format.part_bytes(rows, columns))

    name = weight.name.rpartition(".")[0].rpartition(".")[2]
    if name in ("q_proj", "q_b_proj"):
        return rows // c.qk_head_dim * size(c.qk_head_dim, columns)
    if name == "kv_b_proj":  # keys turned over, for queries to be multiplied with
        heads = rows // (c.qk_nope_head_dim + c.v_head_dim)
        return heads * (size(columns, c.qk_nope_head_dim) + size(c.v_head_dim, columns))
    if name == "kv_a_proj_with_mqa":  # begins where q_a ends
        above = c.q_lora_rank or 0
        return size(above + rows, columns) - size(above, columns)
    return size(rows, columns)


def moves_experts(config: ModelConfig, topology: Topology, rebalance: str) -> bool:
    """Whether experts may move, so that a rank has spare memory for one; rebalance: as in `EngineConfig`."""
    return rebalance != "off" and topology.ranks > 1 and bool(config.moe_layers)


def expert_bytes(
    config: ModelConfig, dtype: str, quantise: str | Precision = "none", packed: bool = False
) -> int:
    """Bytes of one routed expert of one layer; packed: in the order of the CPU's own kernels, which fills up what does
    not divide."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    precision = Precision.of(quantise) if isinstance(quantise, str) else quantise
    format = precision.experts
    if format is PLAIN and not packed:
        return 3 * width * hidden * DTYPE_BYTES[dtype]
    return 2 * sum(format.part_bytes(width, hidden)) + sum(format.part_bytes(hidden, width))


def count_parameters(weights: list[Weight]) -> Counter[str]:
    """Numbers held in each type, block scales included, as model hubs publish them."""
    counts: Counter[str] = Counter()
    for weight in weights:
        counts[weight.dtype] += weight.numel
    return counts
