"""Signatures of the ops, and the choice among their implementations.

Shape suffixes, the legend of the whole project: T token rows, D hidden, H heads, K experts per token, E experts,
S slots per rank, L layers, R rank or received rows, C latent. Here also: N and V, the parts of a head without
rotary position and of its value; P the rotary part.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.errors import InputError
from expertmesh.kernels import eager, reference
from expertmesh.kernels.types import AttentionRows, Rotary, Routing

__all__ = ["AttentionRows", "Kernels", "Rotary", "Routing", "kernels_for"]


class Linear(Protocol):
    """x [T, D] times weight [X, D], transposed, plus bias [X]. Returns [T, X], in any order in memory."""

    def __call__(self, x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


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

    Returns q_N [T, H, N] and q_P [T, H, P] (rotated). Writes (c_kv, rotated k_R) of row t to cache slot
    rows.slots_T[t].
    """

    def __call__(
        self, c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Tensor, rotary: Rotary, rows: AttentionRows,
        cache: Tensor, heads: int,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


class MlaAttention(Protocol):
    """Causal attention of the rows over the paged latents of their sequences. Returns [T, H * V].

    kv_b [H * (N + V), C]: the up-projection of the latents, absorbed into query and output where that is cheaper.
    """

    def __call__(
        self, q_THN: Tensor, q_THP: Tensor, rows: AttentionRows, cache: Tensor, kv_b: Tensor, scale: float,
        value_dim: int,
    ) -> Tensor: ...  # fmt: skip


class Route(Protocol):
    """Experts of each row and their weights, [T, K] int64 and float32, from the router's logits [T, E]."""

    def __call__(
        self, logits_TE: Tensor, bias_E: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]: ...


class Experts(Protocol):
    """SwiGLU experts of my slots, each row weighted and summed over my slots only. Returns [R, D].

    slots_RK: slot of each choice, -1 where the expert is not mine. gate_up_SID: [S, 2 * I, D], down_SDI: [S, D, I].
    """

    def __call__(
        self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Tensor, down_SDI: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """One implementation per op."""

    linear: Linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor, Tensor], Tensor]
    mla_down: MlaDown
    mla_up: MlaUp
    mla_attention: MlaAttention
    route: Route
    experts: Experts
    origin: dict[str, str]

    @property
    def on_reference(self) -> list[str]:
        """Ops for which there is nothing faster here than the reference."""
        return [op for op, origin in self.origin.items() if origin == "reference"]


OPS = tuple(f.name for f in fields(Kernels) if f.name != "origin")


def kernels_for(device_type: str, strict: bool = False) -> Kernels:
    """The fastest version of every op on this kind of device; strict refuses to run any on its reference."""
    # Slowest first: a later module's version of an op takes the place of an earlier one's.
    modules = [("reference", reference), ("eager", eager)]
    chosen: dict[str, Callable[..., object]] = {}
    origin: dict[str, str] = {}
    for name, module in modules:
        for op in OPS:
            if hasattr(module, op):
                chosen[op] = getattr(module, op)
                origin[op] = name
    kernels = Kernels(**chosen, origin=origin)  # type: ignore[arg-type]
    if strict and kernels.on_reference:
        raise InputError(
            f"strict: these ops have only their reference on {device_type}: {', '.join(kernels.on_reference)}"
        )
    return kernels


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
