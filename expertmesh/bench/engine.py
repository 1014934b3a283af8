"""One measurement of this engine on one checkpoint, in a process of its own: `python -m expertmesh.bench.engine`."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from expertmesh.bench.driver import measure, own_peak_rss, read_prompts
from expertmesh.llm import LLM
from expertmesh.mesh.topology import Topology
from expertmesh.request import SamplingParams


class ExpertMesh:
    """This engine, driven step by step."""

    def __init__(self, folder: Path, dtype: str, options: dict[str, Any]) -> None:
        topology = Topology(**options.pop("topology"))
        self.engine = LLM(folder, dtype=dtype, topology=topology, prefix_cache=False, **options).engine

    def peak_rss(self) -> int:
        """Of this process at most, and of the ranks that are processes of their own what they hold at the end, pages
        that they share counted once."""
        return own_peak_rss() + sum(
            psutil.Process(pid).memory_full_info().pss for pid in self.engine.ranks.pids
        )

    def close(self) -> None:
        self.engine.close()

    def prefill(self, tokens: list[int]) -> None:
        self._submit([tokens], 1)
        while self.engine.busy:
            self.engine.step()

    def decode(self, prompts: list[list[int]], count: int) -> tuple[float, list[int]]:
        names = self._submit(prompts, count + 1)
        first: dict[str, int] = {}
        while len(first) < len(prompts):
            first |= {output.request_id: output.token_ids[0] for output in self.engine.step()}
        start = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - start, [first[name] for name in names]

    def _submit(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return [self.engine.submit(tokens, params).id for tokens in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    parser.add_argument("repeats", type=int)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("options", type=json.loads, help="of the cluster")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = read_prompts(args.prompts)
    report = measure(lambda: ExpertMesh(args.folder, args.dtype, args.options), prompts, args.repeats)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
