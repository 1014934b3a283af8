"""How one engine runs a model. Frozen: `resolve` returns a new one."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from expertmesh.config.model import ModelConfig, fits
from expertmesh.config.precision import Precision
from expertmesh.errors import InputError

LONGEST = 86_400  # seconds
PAGE_SIZE = 32  # tokens, where kernels read any
# What a checkpoint's own numbers stay in on a CPU, where nothing is said: FP8 is made bfloat16.
KEPT = ("w8a8", "experts_int4")
EVERY = r"every=([1-9][0-9]{0,8})"
PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs. None means: worked out once by `resolve`, from the model and the memory.

    dtype: what the weights are computed in; "auto" takes the checkpoint's.
    quantise: how the weights of products are kept (`config.precision`): "auto" (as the checkpoint has
    them where kernels keep that, whole numbers and on CUDA FP8 too, else "none"), "none" (as they are computed), "w8a8"
    (8-bit whole numbers times rows that are quantised too), "experts_int8" and "experts_int4" (the routed experts'
    weights in groups of 128), "fp8" (the checkpoint's own FP8 blocks).
    device: what computes: "cpu", "cuda", "npu", or "auto", the first kind of card that is there (`device.find`).
    max_context: longest request in tokens, prompt and output together.
    max_batch_tokens: token rows of one step; at least max_batch_requests, so that decoding never starves.
    max_batch_requests: requests that run at the same time; the others wait.
    chunk: most prompt tokens of one request in one step (chunked prefill); None for no limit but the step's.
    page_size: tokens in one page of the latent cache; by default what kernels read best, 32 on a CPU.
    cache_tokens: tokens that the latent cache holds in all.
    memory_per_rank: what a rank may hold of weights and cache together, such as "64GB" or "512MiB": the cache then
    takes all that the weights leave, which settles cache_tokens.
    prefix_cache: whether requests share the pages of equal beginnings.
    strict: refuse to start where an op would run on its reference.
    Of several ranks: ranks: "threads" of this process, which share weights and start at once, or "processes", of this
    machine or of many; "auto" is processes where each rank has a card, else threads. exchange: the algorithm that takes
    rows to their experts (`mesh.traffic`): ours or, between cards, a native one, which shares rows out to replicas
    evenly. redundant: slots of a layer beyond one per expert, for replicas. timeout: seconds after which a process
    that does not answer has failed; computing is no reason not to. overlap: whether a step is cut into two
    micro-batches, of which one computes while the rows of the other travel: "on", "off", or "auto", which tries and
    keeps what is faster (`engine.plan`); with it, sums of floating-point numbers may differ in their last bits from run
    to run. split: how each step's rows are shared out to the replicas of an expert (`comm.replicas`): "now", "last",
    "even", or "auto", which finds out where rows of processes cross nodes, and is "now" elsewhere.
    rebalance: whether experts move to where the loads want them: "auto", "off", or "every=N" steps.
    """

    dtype: str = "auto"
    quantise: str = "auto"
    device: str = "auto"
    max_context: int | None = None
    max_batch_tokens: int = 2048
    max_batch_requests: int = 64
    chunk: int | None = None
    page_size: int | None = None
    cache_tokens: int | None = None
    memory_per_rank: str | None = None
    prefix_cache: bool = True
    strict: bool = False
    ranks: str = "auto"
    exchange: str = "two_tier"
    redundant: int = 0
    timeout: float = 30.0
    overlap: str = "auto"
    split: str = "auto"
    rebalance: str = "off"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"dtype {self.dtype!r} is not one of auto, float32, bfloat16")
        if self.quantise != "auto":
            Precision.of(self.quantise)
        if self.device not in ("auto", "cpu", "cuda", "npu"):
            raise InputError(f"device {self.device!r} is not one of auto, cpu, cuda, npu")
        if self.ranks not in ("auto", "threads", "processes"):
            raise InputError(f"ranks {self.ranks!r} is not one of auto, threads, processes")
        if self.overlap not in ("auto", "on", "off"):
            raise InputError(f"overlap {self.overlap!r} is not one of auto, on, off")
        if self.split not in ("auto", "now", "last", "even"):
            raise InputError(f"split {self.split!r} is not one of auto, now, last, even")
        if self.rebalance not in ("auto", "off") and not re.fullmatch(EVERY, self.rebalance):
            raise InputError(f"rebalance {self.rebalance!r} is not one of auto, off, every=STEPS")
        if not fits(float, self.timeout) or not 0 < self.timeout <= LONGEST:
            raise InputError(
                f"timeout is {self.timeout!r}, but must be above 0 and at most {LONGEST} seconds"
            )
        if not fits(int, self.redundant):
            raise InputError(f"redundant is {self.redundant!r}, but must be a whole number of at least 0")
        sizes = (
            "max_context",
            "max_batch_tokens",
            "max_batch_requests",
            "chunk",
            "page_size",
            "cache_tokens",
        )
        for name in sizes:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}, but must be a whole number of at least 1")
        if self.memory_per_rank is not None:
            parse_size("memory_per_rank", self.memory_per_rank)
            if self.cache_tokens is not None:
                raise InputError("memory_per_rank settles cache_tokens; give one or the other")
        if self.max_batch_tokens < self.max_batch_requests:
            raise InputError(
                f"max_batch_tokens {self.max_batch_tokens} is less than max_batch_requests "
                f"{self.max_batch_requests}: every running request needs one token row a step"
            )

    def dtype_of(self, model: ModelConfig) -> str:
        """What the model is computed in."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if model.dtype == "float32" else "bfloat16"

    def quantise_of(self, model: ModelConfig, keeps: Collection[str] = KEPT) -> str:
        """How this model's weights are kept. Only bfloat16 is computed with quantised ones. keeps: of a checkpoint's
        own, what kernels keep where nothing is said (`Kernels.keeps`)."""
        if self.quantise != "auto":
            return self.quantise
        return model.kept if model.kept in keeps and self.dtype_of(model) == "bfloat16" else "none"

    def check_precision(self, model: ModelConfig) -> None:
        """InputError where this model's weights cannot be kept as they are to be."""
        if self.quantise not in ("auto", "none") and self.dtype_of(model) != "bfloat16":
            raise InputError(
                f"quantise {self.quantise} computes in bfloat16; leave out dtype {self.dtype_of(model)}"
            )
        if self.quantise == "fp8" and model.fp8_block != (128, 128):
            raise InputError(
                "quantise fp8 keeps FP8 blocks of 128 x 128 as a checkpoint has them, and this one has none; "
                "`expertmesh convert --to fp8` makes one that has"
            )

    def paged(self, best: int, readable: tuple[int, ...]) -> "EngineConfig":
        """With page_size settled. best: what kernels are fastest with; readable: those that they can read, none where
        they read any. InputError where the one that was asked for is none of them."""
        if self.page_size is None:
            return replace(self, page_size=best)
        if readable and self.page_size not in readable:
            sizes = " or ".join(map(str, readable))
            raise InputError(
                f"page_size is {self.page_size}, but kernels here read pages of {sizes} tokens alone"
            )
        return self

    def within(self, model: ModelConfig, weights: int) -> "EngineConfig":
        """With a cache of all that the weights, bytes of a rank, leave of memory_per_rank; the same where there is no
        such limit. InputError where they leave too little for a page."""
        if self.memory_per_rank is None:
            return self
        limit, page = parse_size("memory_per_rank", self.memory_per_rank), self.page_size or PAGE_SIZE
        per_page = cache_bytes_per_token(model, self.dtype_of(model)) * page
        if limit < weights + per_page:
            raise InputError(
                f"memory_per_rank {self.memory_per_rank} is too little: the weights of a rank take {weights} bytes and "
                f"a page of the cache {per_page}; allow more, or take more ranks"
            )
        pages = (limit - weights) // per_page
        return replace(self, memory_per_rank=None, cache_tokens=pages * page)

    def resolve(
        self, model: ModelConfig, free_bytes: int, ranks: int = 1, dedicated: bool = False
    ) -> "EngineConfig":
        """Fill in what is open. free_bytes: memory left for the caches of `ranks` ranks once the weights are in
        place; dedicated: it is there for nothing else."""
        dtype = self.dtype_of(model)
        max_context = self.max_context or model.max_position_embeddings
        if max_context > model.max_position_embeddings:
            raise InputError(
                f"max_context {max_context} is more than the model's {model.max_position_embeddings} positions"
            )
        per_token, page = cache_bytes_per_token(model, dtype), self.page_size or PAGE_SIZE
        cache_tokens = self.cache_tokens
        if cache_tokens is None:
            # Enough for every running request at full length. Of memory that serves others too no more than half of
            # what is free, nor more than 1 GiB in all (or 64 MiB a rank): a laptop has other work.
            most = free_bytes // ranks
            if not dedicated:
                most = min(most // 2, max((1 << 30) // ranks, 1 << 26))
            cache_tokens = max(page, min(max_context * self.max_batch_requests, most // per_token))
        pages = -(-cache_tokens // page)
        return replace(
            self,
            dtype=dtype,
            quantise=self.quantise_of(model),
            max_context=min(max_context, pages * page),
            cache_tokens=pages * page,
            page_size=page,
            chunk=self.chunk or self.max_batch_tokens,
        )


def parse_size(name: str, text: str) -> int:
    """Bytes of "64GB" (10^9 bytes each), "512MiB" (2^20) or a number of bytes. InputError: it is none, or 0."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:([kmgt])(i?)b?|b)?", str(text).strip().lower())
    size = float(found[1]) * (1024 if found[3] else 1000) ** PREFIXES[found[2] or ""] if found else 0
    if size < 1:
        raise InputError(f"{name} is {text!r}, not a size like 64GB, 512MiB or 1000000")
    return int(size)


def cache_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """Bytes of the latent cache of one rank for one token."""
    return model.num_hidden_layers * model.latent_dim * (4 if dtype == "float32" else 2)
