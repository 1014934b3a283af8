"""How often each expert is chosen: what a placement is planned for, and judged by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertmesh.errors import InputError
from expertmesh.mesh.placement import EMPTY, Ints
from expertmesh.mesh.topology import Topology

Floats: TypeAlias = NDArray[np.float64]
MOST = 1e15  # sums of these are exact, or nearly
MOST_EXPERTS, MOST_RANKS = 1 << 16, 1 << 12  # more are a mistake, and would fill the memory


@dataclass(frozen=True, eq=False)
class Loads:
    """Token rows that each expert received, in one or several windows of time or workloads.

    counts_WLE: [windows, layers, experts], float64 or int64, of layers that have loads only. weights_W: how much a
    window counts. layers: the row of the source that each layer was in; rows: how many it had, dense layers too
    (0: up to the last of `layers`). tokens_LTK: each token's expert ids where these were recorded, -1 for none, with
    the same layers. groups: routing groups of the model, where known.

    InputError for loads that are negative, not finite, all zero in a layer, of a wrong shape or no numbers.
    """

    counts_WLE: NDArray[Any]
    weights_W: Floats
    layers: tuple[int, ...]
    tokens_LTK: Ints | None = None
    groups: int | None = None
    rows: int = 0

    def __post_init__(self) -> None:
        counts = as_counts(self.counts_WLE)
        windows, layers, experts = counts.shape
        if self.weights_W.shape != (windows,):
            raise InputError(f"loads: {self.weights_W.size} weights of {windows} windows")
        if not ((self.weights_W > 0) & (self.weights_W <= MOST)).all():
            raise InputError(f"loads: weights of windows must be numbers above 0, {MOST:.0e} at most")
        if layers != len(self.layers) or len(set(self.layers)) != layers or min(self.layers) < 0:
            raise InputError(f"loads: {list(self.layers)} do not name the rows of {layers} layers")
        if not (some := counts.any(axis=(0, 2))).all():
            raise InputError(f"loads: layer {self.layers[int(np.argmin(some))]} has none; leave it out")
        rows = self.rows or max(self.layers) + 1
        if rows <= max(self.layers):
            raise InputError(f"loads: layer {max(self.layers)} is not among {rows} rows")
        if self.groups is not None and (self.groups < 1 or experts % self.groups):
            raise InputError(f"loads: {experts} experts do not divide into {self.groups} groups")
        tokens = self.tokens_LTK
        if tokens is not None and (tokens.ndim != 3 or len(tokens) != layers):
            raise InputError(f"loads: token record of shape {tokens.shape} for {layers} layers")
        if tokens is not None and tokens.size and (tokens.min() < EMPTY or tokens.max() >= experts):
            raise InputError(f"loads: the token record names experts that are not from 0 to {experts - 1}")
        object.__setattr__(self, "counts_WLE", counts)
        object.__setattr__(self, "rows", rows)

    @classmethod
    def of(
        cls,
        counts: NDArray[Any],
        weights: Sequence[float] | Floats | None = None,
        tokens_LTK: Ints | None = None,
        groups: int | None = None,
    ) -> "Loads":
        """From all rows of a source, [layers, experts] or [windows, layers, experts]. Rows without any load are
        dense layers and left out, windows without any too."""
        counts_WLE = as_counts(counts if counts.ndim != 2 else counts[None])
        windows = len(counts_WLE)
        kept = np.flatnonzero(counts_WLE.sum(axis=(1, 2)))
        layers = np.flatnonzero(counts_WLE.sum(axis=(0, 2)))
        weights_W = np.ones(windows) if weights is None else np.asarray(weights, dtype=np.float64)
        if weights_W.shape != (windows,):
            raise InputError(f"loads: {weights_W.size} weights of {windows} windows")
        if tokens_LTK is not None and len(tokens_LTK) == counts_WLE.shape[1]:
            tokens_LTK = tokens_LTK[layers]
        return cls(
            counts_WLE[kept][:, layers],
            weights_W[kept],
            tuple(layers.tolist()),
            tokens_LTK,
            groups,
            counts_WLE.shape[1],
        )

    @classmethod
    def of_tokens(cls, tokens_LTK: Ints, experts: int | None = None) -> "Loads":
        """From each token's expert ids, -1 for none. Where `experts` is not given they end with the last one named."""
        if tokens_LTK.ndim != 3 or not tokens_LTK.size:
            raise InputError(
                f"loads: token record of shape {tokens_LTK.shape} is not [layers, tokens, choices]"
            )
        size = int(tokens_LTK.max()) + 1 if experts is None else experts
        if size > MOST_EXPERTS:
            raise InputError(f"loads: {size} experts a layer; {MOST_EXPERTS} are the most")
        if tokens_LTK.min() < EMPTY or tokens_LTK.max() >= size:
            raise InputError(f"loads: the token record names experts that are not from 0 to {size - 1}")
        flat = tokens_LTK.reshape(len(tokens_LTK), -1)
        counts_LE = np.stack([np.bincount(ids[ids >= 0], minlength=size) for ids in flat])
        return cls.of(counts_LE, tokens_LTK=tokens_LTK)

    @property
    def experts(self) -> int:
        return int(self.counts_WLE.shape[2])

    @property
    def total_LE(self) -> Floats:
        """All windows together, by their weights."""
        # Not by BLAS, whose threads would wait in a loop for more, beside those that search for placements.
        total: Floats = np.einsum("w,wle->le", self.weights_W, self.counts_WLE)
        return total

    def total_of(self, rows: Sequence[int]) -> Floats:
        """`total_LE` of these rows of the source; zeros where a row had no load."""
        full = np.zeros((max([self.rows, *(row + 1 for row in rows)]), self.experts))
        full[list(self.layers)] = self.total_LE
        return full[list(rows)]

    def merged(self, most: int) -> "Loads":
        """With no more than `most` windows: neighbours are added up."""
        windows = len(self.weights_W)
        if windows <= most:
            return self
        weighted = self.counts_WLE * self.weights_W[:, None, None]
        counts_WLE = np.add.reduceat(weighted, np.arange(most) * windows // most)
        return Loads(counts_WLE, np.ones(most), self.layers, self.tokens_LTK, self.groups, self.rows)


def join(parts: Sequence[Loads], weights: Sequence[float] | None = None) -> Loads:
    """The windows of several loads, each part's weighted by one number. InputError where they are not of one model."""
    first = parts[0]
    for number, part in enumerate(parts):
        for name in ("rows", "experts"):
            mine, other = getattr(part, name), getattr(first, name)
            if mine != other:
                unit = "layers" if name == "rows" else name
                raise InputError(f"loads: window {number} has {mine} {unit}, window 0 has {other}")
    layers = sorted({layer for part in parts for layer in part.layers})
    counts = [spread(part.counts_WLE, part.layers, first.rows) for part in parts]
    factors = [1.0] * len(parts) if weights is None else weights
    return Loads(
        np.concatenate(counts)[:, layers],
        np.concatenate([part.weights_W * factor for part, factor in zip(parts, factors, strict=True)]),
        tuple(layers),
        _join_tokens(parts, layers),
        next((part.groups for part in parts if part.groups), None),
        first.rows,
    )


def spread(counts_WLE: NDArray[Any], layers: Sequence[int], rows: int) -> NDArray[Any]:
    """[windows, rows, experts], zero where no layer is."""
    full = np.zeros((len(counts_WLE), rows, counts_WLE.shape[2]), dtype=counts_WLE.dtype)
    full[:, list(layers)] = counts_WLE
    return full


def _join_tokens(parts: Sequence[Loads], layers: Sequence[int]) -> Ints | None:
    """Those of the parts that have any; a part's missing layers and choices are -1."""
    found = [(part.layers, part.tokens_LTK) for part in parts if part.tokens_LTK is not None]
    if not found:
        return None
    most = max(tokens.shape[2] for _, tokens in found)
    out = []
    for mine, tokens in found:
        full = np.full((len(layers), tokens.shape[1], most), EMPTY, dtype=np.int64)
        full[[layers.index(layer) for layer in mine], :, : tokens.shape[2]] = tokens
        out.append(full)
    return np.concatenate(out, axis=1)


def check_fit(loads: Loads, topology: Topology, redundant: int) -> None:
    """InputError where the experts and `redundant` further slots of a layer cannot be on that many ranks."""
    most = loads.experts * (topology.ranks - 1)
    if topology.ranks > MOST_RANKS:
        raise InputError(f"{topology.ranks} cards; experts are placed on {MOST_RANKS} at most")
    if redundant < 0:
        raise InputError(f"{redundant} redundant slots; must be at least 0")
    if redundant > most:
        raise InputError(
            f"{redundant} redundant slots a layer, but {loads.experts} experts on {topology.ranks} cards can use "
            f"{most} at most: a card holds an expert once"
        )


def as_counts(counts: NDArray[Any]) -> NDArray[Any]:
    """As float64, or int64 where they are whole. InputError where they cannot be loads, naming the first wrong one."""
    if counts.dtype.kind not in "iuf":
        raise InputError("loads: they hold values that are no plain numbers")
    if counts.ndim != 3 or not counts.size:
        raise InputError(
            f"loads: shape {list(counts.shape)} is not [layers, experts] or [windows, layers, experts] with any entries"
        )
    whole = counts.dtype.kind == "i" or counts.dtype in (np.uint8, np.uint16, np.uint32)
    out = counts.astype(np.int64 if whole else np.float64)
    for wrong, name in (
        (~np.isfinite(out), "is not a finite number"),
        (out < 0, "is negative"),
        (out > MOST, "is too large"),
    ):
        if wrong.any():
            window, layer, expert = (int(i) for i in np.argwhere(wrong)[0])
            place = f"layer {layer}, expert {expert}" + (f" of window {window}" if len(out) > 1 else "")
            raise InputError(
                f"loads: {out[window, layer, expert]} at {place} {name}; loads are from 0 to {MOST:.0e}"
            )
    if not out.any():
        raise InputError("loads: all are zero")
    return out
