"""Ops on a CPU, written in C++ (`native/cpu`): bfloat16 rows, packed weights.

The same source is compiled for what the processor has. Signatures and shapes are documented in `table`, semantics in
`reference`.
"""

import ctypes
import platform
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from expertmesh.config.precision import PLAIN, Format
from expertmesh.kernels import eager
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.packed import Packed, PackedLatentUp
from expertmesh.kernels.tape import Pool, Tape
from expertmesh.kernels.types import AttentionRows, Prefill, Queries, Rotary, Routing
from expertmesh.native import NotBuilt, library

BF16 = torch.bfloat16
METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}


@dataclass(frozen=True)
class Variant:
    """What the source is compiled for. needs: flags of /proc/cpuinfo."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_V4 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_BF16 = _V4 | {"avx512_bf16", "avx512_vnni"}
_BF16_FLAGS = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
_AMX_FLAGS = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
# The fastest first.
X86 = (
    Variant("AMX", _BF16 | {"amx_tile", "amx_bf16", "amx_int8"}, (*_BF16_FLAGS, *_AMX_FLAGS)),
    Variant("AVX512-BF16", _BF16, _BF16_FLAGS),
    Variant("AVX512", _V4, ("-march=x86-64-v4",)),
    Variant("AVX2", frozenset({"avx2", "fma", "f16c", "bmi2"}), ("-march=x86-64-v3",)),
    Variant("SSE2", frozenset(), ()),
)  # fmt: skip
ELSEWHERE = (Variant("NEON" if platform.machine() in ("arm64", "aarch64") else "portable", frozenset(), ()),)


def variants() -> list[Variant]:
    """Those that this processor can run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return list(ELSEWHERE)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [X86[-1]]
    flags = set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
    return [variant for variant in X86 if variant.needs <= flags]


def open_library(variant: Variant) -> ctypes.CDLL:
    """NotBuilt where there is no compiler, or the system does not let this process use the variant."""
    found = library("cpu/kernels", (*variant.flags, "-fopenmp"))
    if not found.permitted():
        raise NotBuilt(f"the system does not permit {variant.name}")
    return found


class _Own(threading.local):
    """A thread's memory for results: what is given back to the system has to be cleared before it is had again."""

    def __init__(self) -> None:
        self.pool = Pool()


class Cpu:
    """Kernels of one library. While a tape records, ops are written down besides being computed."""

    def __init__(self, variant: Variant) -> None:
        self.library, self.variant = open_library(variant), variant
        self._run = self.library.run_program
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._run.restype = ctypes.c_int64
        self.library.op_named.restype = ctypes.c_int64
        self.library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._ops: dict[str, int] = {}
        self._tape: Tape | None = None
        self._own = _Own()

    # ---- weights

    def matrix(self, shape: tuple[int, ...], split: int, format: Format, kept: Kept) -> Packed:
        return Packed(self.library, shape, split, format, kept.memory)

    def latent_up(self, heads: int, nope: int, value: int, latent: int, kept: Kept) -> PackedLatentUp:
        keys = self.matrix((heads * latent, nope), heads, PLAIN, kept)
        return PackedLatentUp(keys, self.matrix((heads * value, latent), heads, PLAIN, kept), nope)

    def read_memory(self, address: int, size: int, threads: int) -> None:
        """Bytes, by all threads, as fast as this machine can: what ops that read weights are measured by."""
        self.library.read_memory(address, size, threads)

    # ---- tapes

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        """What is computed meanwhile, by this thread, goes on the tape."""
        self._tape = tape
        try:
            yield
        finally:
            self._tape = None

    def replay(self, tape: Tape) -> None:
        self._call(*tape.program)

    def _call(self, program: ctypes.c_void_p, count: ctypes.c_int64) -> None:
        if not self._run(program, count, torch.get_num_threads()):
            raise MemoryError("no memory for the workspace of an op")

    def _do(self, op: str, *words: int) -> None:
        number = self._ops.get(op)
        if number is None:
            number = self._ops[op] = self.library.op_named(op.encode())
        program = (ctypes.c_int64 * (2 + len(words)))(number, len(words), *words)
        self._call(ctypes.cast(program, ctypes.c_void_p), ctypes.c_int64(2 + len(words)))
        if self._tape is not None:
            self._tape.add((number, len(words), *words))

    def _empty(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        pool = self._own.pool if self._tape is None else self._tape.pool
        return pool.empty(shape, dtype)

    def _elsewhere(self) -> None:
        if self._tape is not None:
            self._tape.spoil()

    def _contiguous(self, tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            self._elsewhere()
        return tensor.contiguous()

    # ---- ops

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        rows, width = tokens_T.shape[0], weight_VD.shape[1]
        out = self._empty(rows, width)
        self._do("embed", tokens_T.data_ptr(), weight_VD.data_ptr(), rows, width, out.data_ptr())
        return out

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._contiguous(x), self._contiguous(y)
        out = self._empty(*x.shape)
        self._do("add", x.data_ptr(), y.data_ptr(), x.numel(), out.data_ptr())
        return out

    def count(self, experts_TK: Tensor, counts_E: Tensor) -> None:
        self._do("count", experts_TK.data_ptr(), experts_TK.numel(), counts_E.data_ptr())

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rows, width = x_TD.shape
        out = self._empty(rows, width)
        self._do("rms_norm", x_TD.data_ptr(), weight_D.data_ptr(), _real(eps), rows, width, out.data_ptr())
        return out

    def linear(self, x_TD: Tensor, weight: Packed | Tensor, bias: Tensor | None = None) -> Tensor:
        return self._linear(x_TD, weight, bias, BF16)

    def logits(self, x_TD: Tensor, weight: Packed | Tensor) -> Tensor:
        return self._linear(x_TD, weight, None, torch.float32)

    def _linear(
        self, x_TD: Tensor, weight: Packed | Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(weight, Tensor):  # the embedding's, where the head shares it
            self._elsewhere()
            return eager.linear(x_TD, weight, bias).to(dtype)
        if x_TD.stride(-1) != 1:
            self._elsewhere()
            x_TD = x_TD.contiguous()
        rows = x_TD.shape[0]
        out = self._empty(rows, weight.rows, dtype=dtype)
        self._do(
            "linear", x_TD.data_ptr(), x_TD.stride(0), rows, *weight.words, _address(bias), dtype == torch.float32,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def swiglu(self, x_TD: Tensor, gate_up: Packed, down: Packed) -> Tensor:
        x_TD = self._contiguous(x_TD)
        out = self._empty(x_TD.shape[0], down.rows)
        self._do("swiglu", x_TD.data_ptr(), x_TD.shape[0], *gate_up.words, *down.words, out.data_ptr())
        return out

    def router(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        rows, (experts, width), r = x_TD.shape[0], weight_ED.shape, routing
        chosen = self._empty(rows, r.experts_per_token, dtype=torch.int64)
        weights = self._empty(rows, r.experts_per_token, dtype=torch.float32)
        self._do(
            "router", x_TD.data_ptr(), rows, width, weight_ED.data_ptr(), _address(bias_E), experts,
            r.experts_per_token, r.groups, r.groups_per_token, METHODS[r.method], r.scoring == "sigmoid", r.normalise,
            _real(r.scale), chosen.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        return chosen, weights

    def experts(
        self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up: Packed, down: Packed
    ) -> Tensor:
        x_RD, slots_RK, weights_RK = map(self._contiguous, (x_RD, slots_RK, weights_RK))
        rows, choices = slots_RK.shape
        out = self._empty(rows, down.rows)
        self._do(
            "experts", x_RD.data_ptr(), rows, choices, slots_RK.data_ptr(), weights_RK.data_ptr(), *gate_up.words,
            *down.words, out.data_ptr(),
        )  # fmt: skip
        return out

    # ---- attention

    def mla_down(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, a: Packed, bias_X: Tensor | None, q_norm: Tensor | None,
        kv_norm_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows, latent = x_TD.shape[0], kv_norm_C.shape[0]
        q_lora = 0 if q_norm is None else q_norm.shape[0]
        c_q, c_kv = self._empty(rows, q_lora or a.columns), self._empty(rows, latent)
        k_R = self._empty(rows, a.rows - q_lora - latent)
        words = _down_words(x_TD, norm_D, eps, a, bias_X, q_norm, kv_norm_C)
        self._do("down", *words, c_q.data_ptr(), c_kv.data_ptr(), k_R.data_ptr())
        return c_q, c_kv, k_R

    def mla_up(
        self, c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Packed, kv_b: PackedLatentUp, rotary: Rotary,
        rows: AttentionRows, cache: Tensor, heads: int,
    ) -> Queries:  # fmt: skip
        queries = self._queries(c_q.shape[0], rows, heads, kv_b, k_TP.shape[1])
        c_q, c_kv_TC, k_TP = map(self._contiguous, (c_q, c_kv_TC, k_TP))
        self._do(
            "up", c_q.data_ptr(), c_kv_TC.data_ptr(), k_TP.data_ptr(), c_q.shape[0], *_rotary_words(rotary),
            rows.slots_T.data_ptr(), cache.data_ptr(), *_query_words(q_b, kv_b, queries),
        )  # fmt: skip
        return queries

    def mla_prologue(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, a: Packed, bias_X: Tensor | None, q_norm: Tensor | None,
        kv_norm_C: Tensor, q_b: Packed, kv_b: PackedLatentUp, rotary: Rotary, rows: AttentionRows, cache: Tensor,
        heads: int,
    ) -> Queries:  # fmt: skip
        queries = self._queries(x_TD.shape[0], rows, heads, kv_b, rotary.width)
        self._do(
            "prologue", *_down_words(x_TD, norm_D, eps, a, bias_X, q_norm, kv_norm_C), 0, 0, 0,
            *_rotary_words(rotary), rows.slots_T.data_ptr(), cache.data_ptr(), *_query_words(q_b, kv_b, queries),
        )  # fmt: skip
        return queries

    def _queries(
        self, count: int, rows: AttentionRows, heads: int, kv_b: PackedLatentUp, rope: int
    ) -> Queries:
        return Queries(
            self._empty(count - rows.decoding, heads, kv_b.nope + rope),
            self._empty(rows.decoding, heads, kv_b.keys.rows + rope),
        )

    def mla_attention(
        self,
        queries: Queries,
        rows: AttentionRows,
        cache: Tensor,
        kv_b: PackedLatentUp,
        scale: float,
        value_dim: int,
    ) -> Tensor:
        out = self._empty(rows.decoding + queries.plain.shape[0], kv_b.heads * value_dim)
        if rows.decoding:
            self._decode(queries.absorbed, rows.pages_BM, rows.lengths_B, cache, kv_b, scale, out)
        for prefill in rows.prefills:
            p, tail = prefill.without_tail(), prefill.only_tail()
            if p.count:
                q, to = queries.plain[p.first - rows.decoding :], out[p.first :]
                self._do(
                    "prefill", q.data_ptr(), p.count, p.length, p.pages_M.data_ptr(), *_where(cache), _real(scale),
                    *kv_b.keys.words, *kv_b.values.words, to.data_ptr(),
                )  # fmt: skip
            if tail.count:
                q = queries.plain[tail.first - rows.decoding :][: tail.count]
                self._extend(q, tail, cache, kv_b, scale, out[tail.first :])
        return out

    def _decode(
        self, queries: Tensor, pages_BM: Tensor, lengths_B: Tensor, cache: Tensor, kv_b: PackedLatentUp, scale: float,
        out: Tensor,
    ) -> None:  # fmt: skip
        self._do(
            "decode", queries.data_ptr(), queries.shape[0], pages_BM.data_ptr(), lengths_B.data_ptr(),
            pages_BM.stride(0), *_where(cache), kv_b.keys.rows, _real(scale), *kv_b.values.words, out.data_ptr(),
        )  # fmt: skip

    def _extend(
        self, q: Tensor, prefill: Prefill, cache: Tensor, kv_b: PackedLatentUp, scale: float, out: Tensor
    ) -> None:
        """Each row attends as if it were decoding."""
        count, heads, plain = q.shape
        absorbed = self._empty(count, heads, kv_b.keys.rows + plain - kv_b.nope)
        self._do("absorb", q.data_ptr(), count, plain, *kv_b.keys.words, absorbed.data_ptr())
        lengths = torch.arange(prefill.length - count + 1, prefill.length + 1)
        self._decode(absorbed, prefill.pages_M.expand(count, -1), lengths, cache, kv_b, scale, out)


def _where(cache: Tensor) -> tuple[int, int, int]:
    return cache.data_ptr(), cache.shape[1], cache.shape[2]


def _down_words(
    x_TD: Tensor, norm_D: Tensor, eps: float, a: Packed, bias_X: Tensor | None, q_norm: Tensor | None,
    kv_norm_C: Tensor,
) -> tuple[int, ...]:  # fmt: skip
    latent, q_lora = kv_norm_C.shape[0], 0 if q_norm is None else q_norm.shape[0]
    return (
        x_TD.data_ptr(), norm_D.data_ptr(), _real(eps), x_TD.shape[0], *a.words, _address(bias_X), _address(q_norm),
        kv_norm_C.data_ptr(), q_lora, latent, a.rows - q_lora - latent,
    )  # fmt: skip


def _rotary_words(rotary: Rotary) -> tuple[int, ...]:
    return (
        rotary.positions_T.data_ptr(), rotary.cosines.data_ptr(), rotary.sines.data_ptr(), rotary.interleaved,
        rotary.width,
    )  # fmt: skip


def _query_words(q_b: Packed, kv_b: PackedLatentUp, queries: Queries) -> tuple[int, ...]:
    return (
        *q_b.words, *kv_b.keys.words, queries.absorbed.shape[0], queries.absorbed.data_ptr(),
        queries.plain.data_ptr(),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache
def _real(number: float) -> int:
    """The bits of a double as a word."""
    word: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return word
