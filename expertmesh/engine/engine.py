"""The step loop: schedule, run, update, detokenise."""

import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.balancer import Balancer
from expertmesh.engine.cache import PageCache
from expertmesh.engine.checkpoint import open_checkpoint
from expertmesh.engine.constraints import Constraints
from expertmesh.engine.groups import Groups
from expertmesh.engine.intake import Intake
from expertmesh.engine.interrupts import held_back
from expertmesh.engine.plan import Planner
from expertmesh.engine.processes import ProcessRanks
from expertmesh.engine.ranks import Ranks, ThreadRanks
from expertmesh.engine.sampler import fold_seed
from expertmesh.engine.scheduler import Scheduler
from expertmesh.engine.text import OutputText
from expertmesh.errors import InputError
from expertmesh.kernels import kernels_for
from expertmesh.launch.launcher import Launcher
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.topology import Topology
from expertmesh.request import Output, Request, SamplingParams
from expertmesh.weights import moves_experts


class Engine:
    """Runs requests until they end. Not thread-safe: one thread submits, steps and aborts."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        topology: Topology | None = None,
        progress: bool = False,
        launcher: Launcher | None = None,
    ) -> None:
        self.model = ModelConfig.from_folder(folder)
        self.layout = Layout.of(self.model, topology or Topology(), config.exchange, config.redundant)
        intake = Intake.of(folder, self.model)
        checkpoint = open_checkpoint(folder, self.model)
        kernels = kernels_for("cpu", config.dtype_of(self.model), config.strict)
        if kernels.lacking and config.quantise != "none":
            raise InputError(f"quantise {config.quantise} needs the CPU's own kernels: {kernels.lacking}")
        if kernels.lacking:
            logging.getLogger(__name__).warning(
                "slower than it could be: the CPU's own kernels are not there (%s)", kernels.lacking
            )
        self.ranks: Ranks
        if config.ranks == "processes":
            self.ranks = ProcessRanks(checkpoint, config, self.layout, kernels, launcher)
        else:
            self.ranks = ThreadRanks(checkpoint, config, self.layout, kernels, progress)
        self.config = self.ranks.config
        self.planner = self.new_planner(self.config.overlap)
        self.balancer = self._new_balancer()
        self.scheduler = Groups([_scheduler(self.config) for _ in range(self.layout.topology.groups)])
        assert self.config.max_context  # resolved
        self.intake = intake.limited(self.config.max_context)
        self.constraints = Constraints(self.intake)
        self._texts: dict[str, OutputText] = {}
        self._prompts: dict[str, str | None] = {}
        self._requests: dict[str, Request] = {}
        self._ids = itertools.count()

    def new_planner(self, overlap: str) -> Planner:
        """What decides how steps are computed; overlap: auto, on or off."""
        row_bytes = self.model.hidden_size * (4 if self.config.dtype == "float32" else 2)
        wire = self.config.ranks == "processes" and self.layout.topology.nodes > 1
        return Planner(overlap, row_bytes, wire, self._splits(wire))

    def _splits(self, wire: bool) -> tuple[str, ...]:
        """Ways to share rows out to replicas that the planner may use. Where no wire is waited for, counts of the same
        step cost nothing but their own time, and nothing is tried: such a run repeats itself."""
        slots = self.layout.placement.slots_LRS
        if self.layout.topology.ranks == 1 or int((slots[:1] >= 0).sum()) <= self.model.n_routed_experts:
            return ("even",)
        if self.config.split != "auto":
            return (self.config.split,)
        return ("last", "now", "even") if wire else ("now",)

    def _new_balancer(self) -> Balancer | None:
        mode, layout = self.config.rebalance, self.layout
        if not moves_experts(self.model, layout.topology, mode):
            return None
        return Balancer(mode, self.ranks, layout, self.ranks.memory.kinds["spare"])

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> Request:
        """Queue a request. InputError where it could not run, and then nothing has changed."""
        self.intake.check(tokens, params)
        if request_id is None:
            request_id = next(key for n in self._ids if (key := f"r{n}") not in self._requests)
        if request_id in self._requests:
            raise InputError(f"request id {request_id!r} is in use")
        seed = fold_seed(params.seed) if params.seed is not None else secrets.randbits(63)
        stop_ids, limits = self.intake.stop_ids(params), self.intake.limits(params)
        request = Request(request_id, list(tokens), len(tokens), params, seed, stop_ids, limits)
        self.scheduler.add(request)
        self.constraints.begin(request)
        tokenizer = self.intake.tokenizer
        self._texts[request_id] = OutputText(tokenizer.stream() if tokenizer else None, params.stop)
        self._prompts[request_id] = prompt
        self._requests[request_id] = request
        return request

    def abort(self, request_id: str) -> None:
        """End a request at once and give back its pages; unknown ids are ended already."""
        request = self._requests.get(request_id)
        if request is not None:
            self.scheduler.abort(request)
            self._forget(request_id)

    def abort_all(self) -> None:
        """End every request at once."""
        for request_id in list(self._requests):
            self.abort(request_id)

    def step(self) -> list[Output]:
        """One step of the engine: every running request gets its rows. Returns what got a token or ended."""
        with held_back():
            refused = [self._refuse(request) for request in self.constraints.settle()]
            batches = self.scheduler.schedule()
            if not any(batch.slices for batch in batches):
                self.constraints.rest()
                return refused
            batches = self.constraints.mask(batches)
            plan = self.planner.plan(batches, self.layout.topology.tp)
            start = time.perf_counter()
            results = self.ranks.run(batches, plan)
            taken = time.perf_counter() - start
            self.planner.took(batches, plan, taken)
            if self.balancer is not None:
                self.balancer.after_step(taken, plan.split != "even")
            return refused + [self._output(r) for r in self.scheduler.update(batches, results)]

    def close(self) -> None:
        """End all ranks; nothing can be computed any more."""
        self.constraints.close()
        if self.balancer is not None:
            self.balancer.close()
        self.ranks.close()

    def _output(self, request: Request) -> Output:
        text = self._texts[request.id]
        delta = ""
        if request.finish_reason != "stop" and request.output_length:
            delta = text.push(request.tokens[-1])
            if text.stopped:
                self._stop_by_text(request)
        if request.finish_reason is not None:
            delta += text.finish()
            if text.stopped:
                request.finish_reason = "stop"
        params = request.params
        output = Output(
            request_id=request.id,
            prompt=self._prompts[request.id],
            prompt_token_ids=request.tokens[: request.prompt_length],
            text=text.text,
            token_ids=request.tokens[request.prompt_length :],
            finish_reason=request.finish_reason,
            logprobs=list(request.logprobs) if params.logprobs is not None else None,
            prompt_logprobs=list(request.prompt_logprobs) if params.prompt_logprobs is not None else None,
            cached_tokens=request.cached_tokens,
            delta=delta,
        )
        if output.finished:
            self._forget(request.id)
        return output

    def _refuse(self, request: Request) -> Output:
        """End a request whose grammar could not be compiled."""
        self.scheduler.abort(request)
        return self._output(request)

    def _stop_by_text(self, request: Request) -> None:
        if request.finish_reason is None:
            self.scheduler.finish(request, "stop")

    def _forget(self, request_id: str) -> None:
        for table in (self._texts, self._prompts, self._requests):
            table.pop(request_id, None)


def _scheduler(c: EngineConfig) -> Scheduler:
    """Scheduler and cache of one TP group."""
    assert c.cache_tokens and c.max_context and c.chunk  # resolved
    cache = PageCache(c.cache_tokens // c.page_size, c.page_size, c.prefix_cache)
    return Scheduler(cache, c.max_batch_tokens, c.max_batch_requests, c.chunk, c.max_context)
