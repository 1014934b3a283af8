"""The step loop: schedule, run, update."""

import itertools
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.device import Device, find
from expertmesh.engine.balancer import Balancer
from expertmesh.engine.cache import PageCache
from expertmesh.engine.checkpoint import Progress, open_checkpoint
from expertmesh.engine.constraints import Constraints
from expertmesh.engine.groups import Groups
from expertmesh.engine.intake import Intake
from expertmesh.engine.interrupts import held_back
from expertmesh.engine.plan import Planner
from expertmesh.engine.processes import ProcessRanks
from expertmesh.engine.ranks import Ranks, ThreadRanks
from expertmesh.engine.sampler import fold_seed
from expertmesh.engine.scheduler import Scheduler
from expertmesh.engine.tally import Stopwatch, Tally
from expertmesh.engine.text import Outputs
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels, kernels_for
from expertmesh.launch.launcher import Launcher
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.topology import Topology
from expertmesh.request import Batch, FinishReason, Output, Request, SamplingParams
from expertmesh.weights import moves_experts


class Engine:
    """Runs requests until they end. Not thread-safe: one thread submits, steps and aborts."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        topology: Topology | None = None,
        progress: bool | Progress = False,
        launcher: Launcher | None = None,
    ) -> None:
        self.model = ModelConfig.from_folder(folder)
        self.layout = Layout.of(self.model, topology or Topology(), config.exchange, config.redundant)
        if self.layout.how.native is not None and config.split not in ("auto", "even"):
            raise InputError(
                f"exchange {config.exchange} shares rows out to replicas evenly; leave out split {config.split}"
            )
        intake = Intake.of(folder, self.model)
        checkpoint = open_checkpoint(folder, self.model)
        self.device = device = find(config.device)
        config = _placed(config, device, self.layout)
        self.kernels = kernels = kernels_for(device.kind, config.dtype_of(self.model), config.strict)
        config = _computable(config, kernels, device)
        config = replace(config, quantise=config.quantise_of(self.model, kernels.keeps))
        self.ranks: Ranks
        if config.ranks == "processes":
            told = progress if callable(progress) else None
            self.ranks = ProcessRanks(checkpoint, config, self.layout, kernels, device, launcher, told)
        else:
            self.ranks = ThreadRanks(checkpoint, config, self.layout, kernels, device, progress)
        self.config = self.ranks.config
        self.planner = self.new_planner(self.config.overlap)
        self.balancer = self._new_balancer()
        self.tally = Tally()
        self.scheduler = Groups([_scheduler(self.config) for _ in range(self.layout.topology.groups)])
        assert self.config.max_context  # resolved
        self.intake = intake.limited(self.config.max_context)
        self.constraints = Constraints(self.intake)
        self._outputs = Outputs(self.intake.tokenizer)
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
        if self.layout.how.native is not None or self.layout.topology.ranks == 1:
            return ("even",)
        if int((slots[:1] >= 0).sum()) <= self.model.n_routed_experts:
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

    def check(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """InputError where this request could not run."""
        self.intake.check(tokens, params)
        self.constraints.check(params)

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> Request:
        """Queue a request whose outputs `step` returns. InputError where it could not run, and then nothing has
        changed."""
        request = self.submit_tokens(tokens, params, request_id)
        self._outputs.expect(request, prompt)
        return request

    def submit_tokens(
        self, tokens: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> Request:
        """The same for who makes texts himself, of what `advance` returns."""
        self.check(tokens, params)
        if request_id is None:
            request_id = next(key for n in self._ids if (key := f"r{n}") not in self._requests)
        if request_id in self._requests:
            raise InputError(f"request id {request_id!r} is in use")
        seed = fold_seed(params.seed) if params.seed is not None else secrets.randbits(63)
        stop_ids, limits = self.intake.stop_ids(params), self.intake.limits(params)
        request = Request(request_id, list(tokens), len(tokens), params, seed, stop_ids, limits)
        self.scheduler.add(request)
        self.constraints.begin(request)
        self._requests[request_id] = request
        self.tally.submit(request)
        return request

    def abort(self, request_id: str) -> None:
        """End a request at once and give back its pages; unknown ids are ended already."""
        self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """The same, for a reason of one's own: a stop text that the engine does not see."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.finish(request, reason)
            self.tally.end(request)
            self._outputs.forget(request_id)

    def abort_all(self) -> None:
        """End every request at once."""
        for request_id in list(self._requests):
            self.abort(request_id)

    def step(self) -> list[Output]:
        """One step of the engine: every running request gets its rows. Returns what got a token or ended."""
        with held_back():
            return [self._output(request) for request in self._advance()]

    def advance(self) -> list[Request]:
        """The same in tokens only, without a copy of any: what a request got is at the end of its lists."""
        with held_back():
            return self._advance()

    def heartbeat(self) -> None:
        """A step without rows, which shows that all ranks can compute one. RankFailure where they cannot."""
        batches = [Batch(())] * self.layout.topology.groups
        with held_back():
            self.ranks.run(batches, self.planner.plan(batches, self.layout.topology.tp))

    def _advance(self) -> list[Request]:
        watch = Stopwatch()
        advanced = self.constraints.settle()
        for request in advanced:  # grammars that could not be compiled
            self.scheduler.abort(request)
        batches = self.scheduler.schedule()
        if any(batch.slices for batch in batches):
            advanced += self._compute(self.constraints.mask(batches), watch)
        else:
            self.constraints.rest()
        for request in advanced:
            if request.finish_reason is not None:
                self.tally.end(self._requests.pop(request.id))
        return advanced

    def _compute(self, batches: Sequence[Batch], watch: Stopwatch) -> list[Request]:
        plan = self.planner.plan(batches, self.layout.topology.tp)
        split = plan.split != "even"
        self.tally.begin(batches)
        watch.lap("schedule")
        results = self.ranks.run(batches, plan)
        taken = watch.lap("ranks")
        self.planner.took(batches, plan, taken)
        if self.balancer is not None:
            self.balancer.after_step(taken, split)
        watch.lap("balance")
        advanced = self.scheduler.update(batches, results)
        watch.lap("update")
        self.tally.step(batches, sum(r.params.max_tokens > 0 for r in advanced), watch, split)
        return advanced

    def close(self) -> None:
        """End all ranks; nothing can be computed any more."""
        self.constraints.close()
        if self.balancer is not None:
            self.balancer.close()
        self.ranks.close()

    def _output(self, request: Request) -> Output:
        output = self._outputs.of(request)
        if output.finished and request.finish_reason is None:
            self.finish(request.id, "stop")
        request.finish_reason = output.finish_reason
        return output


def _placed(config: EngineConfig, device: Device, layout: Layout) -> EngineConfig:
    """With the device and the kind of ranks that "auto" stands for. InputError where ranks cannot be on this device as
    they are asked for."""
    several = device.is_card and layout.topology.ranks > 1
    if layout.how.native is not None and not several:
        package = layout.how.native
        raise InputError(f"exchange {layout.how.name} is {package}'s, between cards; here take two_tier")
    ranks = config.ranks
    if ranks == "auto":
        ranks = "processes" if several else "threads"
    if several and ranks == "threads":
        raise InputError(
            f"ranks threads: on {device.kind} each rank is a process, which has a card of its own; say processes, or "
            "--device cpu"
        )
    if several and config.rebalance != "off":
        raise InputError(
            f"rebalance {config.rebalance}: experts move between processors only, not on {device.kind}"
        )
    return replace(config, device=device.kind, ranks=ranks)


def _computable(config: EngineConfig, kernels: Kernels, device: Device) -> EngineConfig:
    """As it can be computed with these kernels. Where our own are not there that is said, quantised weights are made
    whole, and those that have to be quantised are an InputError."""
    if not kernels.lacking:
        return config
    own = "the CPU's own kernels" if device.kind == "cpu" else f"kernels of our own for {device.kind}"
    if config.quantise not in ("auto", "none"):
        raise InputError(f"quantise {config.quantise} needs {own}: {kernels.lacking}")
    logging.getLogger(__name__).warning(
        "slower than it could be: %s are not there (%s)", own, kernels.lacking
    )
    return replace(config, quantise="none")


def _scheduler(c: EngineConfig) -> Scheduler:
    """Scheduler and cache of one TP group."""
    assert c.cache_tokens and c.max_context and c.chunk and c.page_size  # resolved
    cache = PageCache(c.cache_tokens // c.page_size, c.page_size, c.prefix_cache)
    return Scheduler(cache, c.max_batch_tokens, c.max_batch_requests, c.chunk, c.max_context)
