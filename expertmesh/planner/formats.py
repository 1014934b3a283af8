"""How weights, rows and the cache are kept, and in which arithmetic a card multiplies them."""

from dataclasses import dataclass

from expertmesh.config.precision import FP8, INT4, INT8, PLAIN, W8A8, Format, Precision
from expertmesh.errors import InputError
from expertmesh.planner.cards import Arithmetic

# Blocks of 16 numbers of 4 bits with an FP8 scale each (NVFP4); no kernel of this engine has it.
FP4 = Format("fp4", -1, 128, 16, scale_bytes=1)


@dataclass(frozen=True)
class Weights:
    """precision: as the engine keeps them; linear, experts: arithmetic of the products; engine: what the engine calls
    it, None where it has no kernels for it."""

    name: str
    precision: Precision
    linear: Arithmetic = "bf16"
    experts: Arithmetic = "bf16"
    engine: str | None = None


WEIGHTS = {
    w.name: w
    for w in (
        Weights("bf16", Precision(), engine="none"),
        Weights("fp8", Precision(FP8, FP8), "fp8", "fp8", "fp8"),
        Weights("int8", Precision(W8A8, W8A8), "int8", "int8", "w8a8"),
        Weights("w4a8", Precision(W8A8, INT4), "int8", "int8"),
        Weights("fp4", Precision(FP8, FP4), "fp8", "fp4"),
        Weights("experts_int8", Precision(experts=INT8), engine="experts_int8"),
        Weights("experts_int4", Precision(experts=INT4), engine="experts_int4"),
    )
}
OTHER_NAMES = {
    "nvfp4": "fp4", "mxfp4": "fp4", "w8a8": "int8", "bfloat16": "bf16", "fp16": "bf16", "int4": "experts_int4",
    "w4a16": "experts_int4",
}  # fmt: skip
# Bytes of a number in the latent cache.
CACHES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0}


def weights(name: str) -> Weights:
    """The way of keeping weights of this name. InputError where there is none."""
    known = OTHER_NAMES.get(name.lower(), name.lower())
    if known not in WEIGHTS:
        raise InputError(f"weight precision {name!r} is not one of {', '.join(WEIGHTS)}")
    return WEIGHTS[known]


def of_engine(quantise: str) -> str:
    """The name here of what the engine calls so."""
    return next(kept.name for kept in WEIGHTS.values() if kept.engine == quantise)


def weight_bytes(form: Format) -> float:
    """Bytes of one weight, its share of a scale included."""
    if form is PLAIN:
        return 2.0
    scales = form.scale_bytes / form.group if form.group else 0.0
    return 64 / form.per_chunk + scales
