"""One measurement of one engine on one checkpoint, in a process of its own.

Every engine gets the same token ids, chooses greedily, and is timed with the same clock around the same work: the
first token of a 512-token prompt (prefill), and tokens after the first (decoding). Peers' own environments run this
file: it imports the standard library, and the engine that it measures.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

PREFILL = 512
DECODE_PROMPT = 32
DECODE_TOKENS = {1: 48, 16: 24}  # of each prompt, by batch
SEQUENCES = max(DECODE_TOKENS)
CACHE = 1024  # tokens: one long prompt, or 16 sequences


class Measured(Protocol):
    """An engine under measurement."""

    def prefill(self, tokens: list[int]) -> None:
        """Compute the prompt and choose one token."""
        ...

    def decode(self, prompts: list[list[int]], count: int) -> tuple[float, list[int]]:
        """Seconds for `count` further tokens of every prompt after the first one, and those first ones."""
        ...

    def peak_rss(self) -> int:
        """Bytes of memory in use at most."""
        ...

    def close(self) -> None: ...


def own_peak_rss() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says may be of the program that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Transformers:
    """transformers' implementation with its own cache, without the overhead of its `generate`."""

    @staticmethod
    def imported() -> None:
        import torch  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.tensor = torch.tensor
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def prefill(self, tokens: list[int]) -> None:
        out = self.model(self.tensor([tokens]), use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1)

    def decode(self, prompts: list[list[int]], count: int) -> tuple[float, list[int]]:
        out = self.model(self.tensor(prompts), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = token.flatten().tolist()
        start = time.perf_counter()
        for _ in range(count):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - start, first

    def peak_rss(self) -> int:
        return own_peak_rss()

    def close(self) -> None:
        pass


class VLLM:
    """vLLM's engine in this process, driven step by step, without tokenizer and server."""

    @staticmethod
    def imported() -> None:
        import vllm.entrypoints.llm  # noqa: F401

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        # Prompts of a round are new; a cache of beginnings would only cost. Compiled models (without enforce_eager)
        # are no faster here and take half a minute to start.
        self.engine = LLM(
            str(folder),
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=CACHE,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=CACHE,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
        ).llm_engine
        self.submitted = 0

    def prefill(self, tokens: list[int]) -> None:
        self._submit([tokens], 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def decode(self, prompts: list[list[int]], count: int) -> tuple[float, list[int]]:
        names = self._submit(prompts, count + 1)
        first: dict[str, int] = {}
        while len(first) < len(prompts):
            first |= {out.request_id: out.outputs[0].token_ids[0] for out in self.engine.step()}
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start, [first[name] for name in names]

    def _submit(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        params = self.params(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        names = [str(self.submitted + number) for number in range(len(prompts))]
        self.submitted += len(prompts)
        for name, tokens in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
        return names

    def peak_rss(self) -> int:
        return own_peak_rss()

    def close(self) -> None:
        pass


def prompts_of(vocabulary: int, repeats: int) -> list[list[int]]:
    """All prompts of a measurement, in the order in which `measure` takes them; the same in every process."""
    lengths = [PREFILL, DECODE_PROMPT]
    lengths += repeats * [PREFILL, *(DECODE_PROMPT for batch in DECODE_TOKENS for _ in range(batch))]
    generator = random.Random(1)
    return [generator.choices(range(min(vocabulary, 1000)), k=length) for length in lengths]


def measure(load: Callable[[], Measured], prompts: Iterator[list[int]], repeats: int) -> dict[str, Any]:
    """Load, warm up, and take the median of `repeats`. Speeds in tokens/s, times in seconds, memory in bytes;
    bare_rss_bytes is what the process has held at most before loading, all of it imported."""
    bare = own_peak_rss()
    start = time.perf_counter()
    engine = load()
    load_seconds = time.perf_counter() - start
    engine.prefill(next(prompts))
    _, first = engine.decode([next(prompts)], 4)
    prefill: list[float] = []
    decode: dict[int, list[float]] = {batch: [] for batch in DECODE_TOKENS}
    for _ in range(repeats):
        prompt = next(prompts)
        start = time.perf_counter()
        engine.prefill(prompt)
        prefill.append(PREFILL / (time.perf_counter() - start))
        for batch, count in DECODE_TOKENS.items():
            seconds, tokens = engine.decode([next(prompts) for _ in range(batch)], count)
            decode[batch].append(batch * count / seconds)
            first += tokens
    peak_rss = engine.peak_rss()
    engine.close()
    return {
        "load_seconds": load_seconds,
        "bare_rss_bytes": bare,
        "peak_rss_bytes": peak_rss,
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": {str(batch): statistics.median(v) for batch, v in decode.items()},
        "first_tokens": first,
    }


def read_prompts(file: Path) -> Iterator[list[int]]:
    """One prompt a line, token ids with spaces between."""
    return iter([list(map(int, line.split())) for line in file.read_text(encoding="ascii").splitlines()])


ENGINES: dict[str, type[Transformers] | type[VLLM]] = {"transformers": Transformers, "vllm": VLLM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    parser.add_argument("repeats", type=int)
    parser.add_argument("prompts", type=Path)
    args = parser.parse_args()
    engine = ENGINES[args.engine]
    engine.imported()  # no part of loading
    prompts = read_prompts(args.prompts)
    report = measure(lambda: engine(args.folder, args.dtype, args.threads), prompts, args.repeats)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
