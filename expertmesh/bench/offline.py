"""The engine without a server: the same requests, all there from the start."""

import time
from typing import Any

from expertmesh.bench.load import Load
from expertmesh.bench.prompts import TokenPrompts
from expertmesh.bench.serve import BEFORE
from expertmesh.llm import LLM
from expertmesh.planner.arrivals import Arrival
from expertmesh.request import SamplingParams


def offline(llm: LLM, load: Load, vocabulary: int) -> dict[str, Any]:
    """Throughput of a load's requests in an engine alone; it runs as many at a time as it was made for."""
    prompts = TokenPrompts(vocabulary, load.prefix, load.seed)
    arrivals = list(load.arrivals())

    def generate(first: int, asked: list[Arrival]) -> int:
        tokens = [prompts.fields(first + n, arrival)["prompt"] for n, arrival in enumerate(asked)]
        params = [SamplingParams(max_tokens=a.output, temperature=0, ignore_eos=True) for a in asked]
        return sum(len(output.token_ids) for output in llm.generate(tokens, params))

    generate(BEFORE, arrivals[:1])
    start = time.perf_counter()
    tokens = generate(0, arrivals)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "output_tokens_per_second": tokens / seconds}
