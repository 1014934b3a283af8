"""Signatures of the ops, and the choice among their implementations.

Shape suffixes, the legend of the whole project: T token rows, D hidden, H heads, K experts per token, E experts,
S slots per rank, L layers, R rank or received rows, C latent. Here also: N and V, the parts of a head without
rotary position and of its value; P the rotary part.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.config.engine import KEPT, PAGE_SIZE
from expertmesh.config.precision import PRECISIONS, Format, Precision
from expertmesh.errors import InputError
from expertmesh.kernels import eager, grouped, reference
from expertmesh.kernels.cpu import Cpu, variants
from expertmesh.kernels.memory import Cache, Kept, latent_cache
from expertmesh.kernels.npu import cache
from expertmesh.kernels.npu.contracts import PUBLISHED, Limit
from expertmesh.kernels.packed import LatentUp, Weight
from expertmesh.kernels.tape import Recorder
from expertmesh.kernels.types import AttentionRows, Queries, Rotary, Routing
from expertmesh.native import NotBuilt

__all__ = ["AttentionRows", "Kernels", "Queries", "Rotary", "Routing", "kernels_for"]


class Matrix(Protocol):
    """Memory for weights [..., N, K] in the form that products want. split: into how many parts the rows of each [N, K]
    are divided that are computed apart from each other, as gate and up, or heads."""

    def __call__(self, shape: tuple[int, ...], split: int, format: Format, kept: Kept) -> Weight: ...


class NewLatentUp(Protocol):
    """Memory for the up-projection of the latents, [heads * (nope + value), latent]."""

    def __call__(self, heads: int, nope: int, value: int, latent: int, kept: Kept) -> LatentUp: ...


class NewCache(Protocol):
    """The latent cache of one layer, zeros: each token has a latent [C] and a rotated key [P] that all heads share."""

    def __call__(
        self, pages: int, page: int, latent: int, rope: int, dtype: torch.dtype, device: torch.device
    ) -> Cache: ...


class Linear(Protocol):
    """x [T, D] times weight [X, D], transposed, plus bias [X]. Returns [T, X], in any order in memory."""

    def __call__(self, x_TD: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor: ...


class MlaDown(Protocol):
    """Norm and low-rank projections of my rows: the half of the MLA prologue before the TP group's gather.

    Returns c_q [T, q_lora or D], c_kv [T, C] and k_R [T, P], the first two normed, the last not yet rotated. Where
    the model has no q_lora, c_q is the normed input itself.
    """

    def __call__(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None,
        q_norm: Tensor | None, kv_norm_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class MlaUp(Protocol):
    """The half after the gather: queries of my heads, rotary positions, and the write into the paged cache.

    kv_b: the up-projection of the latents, whose keys' part may be absorbed into queries. Writes (c_kv, rotated k_R) of
    row t to cache slot rows.slots_T[t].
    """

    def __call__(
        self, c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Weight, kv_b: LatentUp, rotary: Rotary,
        rows: AttentionRows, cache: Cache, heads: int,
    ) -> Queries: ...  # fmt: skip


class MlaPrologue(Protocol):
    """Both halves in one, for a rank whose TP group is itself."""

    def __call__(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, a: Weight, bias_X: Tensor | None, q_norm: Tensor | None,
        kv_norm_C: Tensor, q_b: Weight, kv_b: LatentUp, rotary: Rotary, rows: AttentionRows, cache: Cache, heads: int,
    ) -> Queries: ...  # fmt: skip


class MlaAttention(Protocol):
    """Causal attention of the rows over the paged latents of their sequences. Returns [T, H * V].

    kv_b [H * (N + V), C]: the up-projection of the latents, absorbed into query and output where that is cheaper.
    """

    def __call__(
        self,
        queries: Queries,
        rows: AttentionRows,
        cache: Cache,
        kv_b: LatentUp,
        scale: float,
        value_dim: int,
    ) -> Tensor: ...


class Router(Protocol):
    """Experts of each row and their weights, [T, K] int64 and float32. Scores are of products with weight [E, D], in
    float32."""

    def __call__(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]: ...


class Experts(Protocol):
    """SwiGLU experts of my slots, each row weighted and summed over my slots only. Returns [R, D].

    slots_RK: slot of each choice, -1 where the expert is not mine. gate_up_SID: [S, 2 * I, D], down_SDI: [S, D, I].
    """

    def __call__(
        self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Weight, down_SDI: Weight
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """One implementation per op. de_interleaved: weights have the rows of rotary parts in the order of halves
    (`places.de_interleaved`), whatever the checkpoint has; cache: makes the latent cache as these kernels have it in
    memory; precisions: what weights are kept as, by the name of `EngineConfig.quantise`; keeps: those of them that a
    checkpoint's own weights stay in where nothing is said; page: tokens of a page of the cache that they are fastest
    with; page_sizes: those that they can read, none where they read any; graph: what records a step's ops and runs them
    again in one call, where these kernels can; lacking: why the device's own kernels are not there, where they should
    be; uncaptured: why a graph of the device cannot hold a step of these ops, where it cannot."""

    matrix: Matrix
    latent_up: NewLatentUp
    embed: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor, Tensor], None]
    linear: Linear
    logits: Callable[[Tensor, Weight], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Weight, Weight], Tensor]
    mla_down: MlaDown
    mla_up: MlaUp
    mla_prologue: MlaPrologue
    mla_attention: MlaAttention
    router: Router
    experts: Experts
    origin: dict[str, str]
    de_interleaved: bool = False
    cache: NewCache = latent_cache
    precisions: Mapping[str, Precision] = field(default_factory=lambda: PRECISIONS)
    keeps: tuple[str, ...] = KEPT
    page: int = PAGE_SIZE
    page_sizes: tuple[int, ...] = ()
    graph: Recorder | None = None
    lacking: str = ""
    uncaptured: str = ""

    def precision(self, quantise: str) -> Precision:
        """InputError where these kernels keep no weights so."""
        if quantise not in self.precisions:
            raise InputError(
                f"quantise {quantise} is not for the kernels of this device; say {', '.join(self.precisions)}"
            )
        return self.precisions[quantise]

    @property
    def on_reference(self) -> list[str]:
        """Ops for which there is nothing faster here than the reference."""
        return [op for op, origin in self.origin.items() if origin == "reference"]


# Fields without a default are implementations of ops.
OPS = tuple(
    f.name for f in fields(Kernels) if f.default is f.default_factory is MISSING and f.name != "origin"
)


# Kinds of devices that are accelerators, and the package that gives them kernels.
ACCELERATORS = {"cuda": "triton", "npu": "torch-npu"}
# Tokens of a page: a page is one tile of keys, and Ascend waits less often with larger ones.
PAGES = {"cuda": PAGE_SIZE, "npu": 128}


def kernels_for(device_type: str, dtype: str = "float32", strict: bool = False) -> Kernels:
    """The fastest version of every op on this kind of device; strict refuses to run any on its reference, or on library
    kernels where there are some of our own for this type."""
    kernels = kernels_of(None)
    try:
        if device_type in ACCELERATORS:
            kernels = _libraries(device_type)
            kernels = accelerated(device_type)
        elif device_type == "cpu" and dtype == "bfloat16":
            kernels = kernels_of(native())
    except NotBuilt as error:
        if strict:
            raise InputError(f"strict: kernels of our own for {device_type} are not there: {error}") from None
        kernels = replace(kernels, lacking=str(error))
    if strict and kernels.on_reference:
        raise InputError(
            f"strict: these ops have only their reference on {device_type}: {', '.join(kernels.on_reference)}"
        )
    return kernels


def kernels_of(graph: Cpu | None) -> Kernels:
    """The fastest version of every op, with these kernels of the CPU."""
    own: list[tuple[str, Any]] = [] if graph is None else [(graph.variant.name, graph)]
    return replace(_fastest(own), graph=graph)


def accelerated(device_type: str) -> Kernels:
    """The fastest version of every op on an accelerator. NotBuilt where what it is made of is not installed.

    On Ascend torch_npu's own ops where it is, for all ops, and kernels in Triton where it is not. No op is taken from
    both: they want weights and cache in different orders, and memory has room for one. Its own win since matrix units
    read FRACTAL_NZ through them alone, and since rows that decode take one launch for the whole prologue.
    """
    if device_type == "npu":
        try:
            return fused_by_ascend()
        except ImportError as error:
            if error.name != "torch_npu":
                raise NotBuilt(f"torch_npu does not load ({error}); set up CANN (set_env.sh)") from None
    try:
        from expertmesh.kernels.triton import attention, moe, weights
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        package = ACCELERATORS[device_type]
        raise NotBuilt(f"{package} is not installed; pip install {package}") from None
    own = _fastest([("grouped", grouped), ("triton", weights), ("triton", attention), ("triton", moe)])
    # Cards of Ascend have no FP8: there it stays where that is asked for.
    keeps = ("fp8", "w8a8") if device_type == "cuda" else ("w8a8",)
    return replace(
        own, de_interleaved=True, page=PAGES[device_type], precisions=weights.PRECISIONS, keeps=keeps
    )


def _libraries(device_type: str) -> Kernels:
    """What a card computes with where nothing was made for it."""
    kernels = _fastest([("grouped", grouped)])
    why = "library kernels read all of the longest context there may be"
    return replace(kernels, page=PAGES[device_type], uncaptured=why)


def fused_by_ascend(limits: Mapping[str, Limit] = PUBLISHED) -> Kernels:
    """Ops of torch_npu. limits: of the card, as published. ImportError where it is not installed or does not load."""
    import torch_npu  # noqa: F401  (all of them need it, also where they have been imported before)

    from expertmesh.kernels.npu.attention import Attention
    from expertmesh.kernels.npu.moe import Moe
    from expertmesh.kernels.npu.ops import Ops
    from expertmesh.kernels.npu.products import Products

    ops = Ops(limits)
    products = Products(ops)
    own = [("torch_npu", each) for each in (products, Attention(ops, products), Moe(ops, products))]
    return replace(
        _fastest([("grouped", grouped), *own]),
        cache=cache.latent_cache,
        page=cache.PAGE_SIZES[0],
        page_sizes=cache.PAGE_SIZES,
        keeps=("w8a8",),
        uncaptured="attention takes the lengths of sequences from the host",
    )


def _fastest(own: list[tuple[str, Any]]) -> Kernels:
    """Slowest first: a later module's version of an op takes the place of an earlier one's."""
    chosen: dict[str, Callable[..., object]] = {}
    origin: dict[str, str] = {}
    for name, module in (("reference", reference), ("eager", eager), *own):
        for op in OPS:
            if hasattr(module, op):
                chosen[op] = getattr(module, op)
                origin[op] = name
    return Kernels(**chosen, origin=origin)  # type: ignore[arg-type]


def native() -> Cpu:
    """The kernels of the fastest variant that this processor runs and that can be built. NotBuilt where none is."""
    problem: NotBuilt | None = None
    for variant in variants():
        try:
            return Cpu(variant)
        except NotBuilt as error:
            problem = problem or error
    assert problem is not None
    raise problem


def reference_kernels() -> Kernels:
    """The oracle for every op."""
    chosen = {op: getattr(reference, op) for op in OPS}
    return Kernels(**chosen, origin=dict.fromkeys(OPS, "reference"))


def routing_of(config: ModelConfig) -> Routing:
    return Routing(
        experts_per_token=config.num_experts_per_tok,
        groups=config.n_group,
        groups_per_token=config.topk_group,
        method=config.topk_method,
        scoring=config.scoring_func,
        normalise=config.norm_topk_prob and config.scoring_func == "sigmoid",
        scale=config.routed_scaling_factor,
    )
