"""One measurement of one engine on one checkpoint, in a process of its own: `python -m expertmesh.bench.engine`.

Both engines get the same token ids, choose greedily, and are timed with the same clock around the same work: the
first token of a 512-token prompt (prefill), and tokens after the first (decoding).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

PREFILL = 512
DECODE_PROMPT = 32
DECODE_TOKENS = {1: 48, 16: 24}


class Measured(Protocol):
    """An engine under measurement."""

    def prefill(self, tokens: list[int]) -> None:
        """Compute the prompt and choose one token."""
        ...

    def decode(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` further tokens of every prompt, after the first one."""
        ...

    def peak_rss(self) -> int:
        """Bytes of memory in use at most."""
        ...

    def close(self) -> None: ...


class ExpertMesh:
    """This engine, driven step by step."""

    def __init__(self, folder: Path, dtype: str, options: dict[str, Any]) -> None:
        from expertmesh.llm import LLM
        from expertmesh.mesh.topology import Topology

        topology = Topology(**options.pop("topology"))
        self.engine = LLM(folder, dtype=dtype, topology=topology, prefix_cache=False, **options).engine

    def peak_rss(self) -> int:
        """Of this process at most, and of the ranks that are processes of their own what they hold at the end, pages
        that they share counted once."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return own + sum(psutil.Process(pid).memory_full_info().pss for pid in self.engine.ranks.pids)

    def close(self) -> None:
        self.engine.close()

    def prefill(self, tokens: list[int]) -> None:
        self._submit([tokens], 1)
        while self.engine.busy:
            self.engine.step()

    def decode(self, prompts: list[list[int]], count: int) -> float:
        self._submit(prompts, count + 1)
        produced = 0
        while produced < len(prompts):
            produced += len(self.engine.step())
        start = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - start

    def _submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        from expertmesh.request import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        for tokens in prompts:
            self.engine.submit(tokens, params)


class Transformers:
    """transformers' implementation with its own cache, without the overhead of its `generate`."""

    def __init__(self, folder: Path, dtype: str, options: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> None:
        out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], count: int) -> float:
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        start = time.perf_counter()
        for _ in range(count):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - start

    def peak_rss(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        pass


ENGINES: dict[str, Callable[[Path, str, dict[str, Any]], Measured]] = {
    "expertmesh": ExpertMesh,
    "transformers": Transformers,
}


def measure(
    name: str, folder: Path, dtype: str, vocabulary: int, repeats: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Load, warm up, and take the median of `repeats`. Speeds in tokens/s, times in seconds, memory in bytes."""
    if name == "transformers":
        import transformers  # noqa: F401  (its import is no part of loading)
    else:
        import expertmesh.llm  # noqa: F401
    start = time.perf_counter()
    engine: Measured = ENGINES[name](folder, dtype, options)
    load_seconds = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)

    def prompt(length: int) -> list[int]:
        return torch.randint(min(vocabulary, 1000), (length,), generator=generator).tolist()

    engine.prefill(prompt(PREFILL))
    engine.decode([prompt(DECODE_PROMPT)], 4)
    prefill, decode = [], {batch: [] for batch in DECODE_TOKENS}  # type: ignore[var-annotated]
    for _ in range(repeats):
        start = time.perf_counter()
        engine.prefill(prompt(PREFILL))
        prefill.append(PREFILL / (time.perf_counter() - start))
        for batch, count in DECODE_TOKENS.items():
            seconds = engine.decode([prompt(DECODE_PROMPT) for _ in range(batch)], count)
            decode[batch].append(batch * count / seconds)
    peak_rss = engine.peak_rss()
    engine.close()
    return {
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss,
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": {str(batch): statistics.median(v) for batch, v in decode.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("repeats", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("options", type=json.loads, help="of the cluster, for this engine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = measure(args.engine, args.folder, args.dtype, args.vocabulary, args.repeats, args.options)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
