"""A service under load: instances that decode and instances that prefill, together or apart, and requests that come as
others leave (a closed loop of constant concurrency)."""

from dataclasses import dataclass, replace
from functools import lru_cache

from expertmesh.errors import InputError
from expertmesh.planner.costs import Step, accepted_tokens, decode_step, prefill_step
from expertmesh.planner.deployment import Decode, Deployment, Prefill
from expertmesh.planner.imbalance import highest
from expertmesh.planner.parameters import Parameters

CHUNK = 16384  # most tokens of prompts that a card takes in one step
# Seconds from a request's arrival to its first token, beside prefill: at 4 requests of 1,024 tokens 0.26 to 0.31 are
# published (InferenceX, TP8 of H200), of which prefill takes a tenth.
ADMISSION = 0.2


def chunk(d: Deployment) -> float:
    """Most tokens of prompts that a TP group takes in one step."""
    return CHUNK / d.card.dies_per_card * d.topology.tp


@dataclass(frozen=True)
class Workload:
    """Tokens of a request: input, of which cached are known already, and output."""

    input: float
    output: float
    cached: float = 0.0

    def __post_init__(self) -> None:
        if not self.input > self.cached >= 0 or not self.output >= 1:
            raise InputError(
                f"requests of {self.input} tokens, {self.cached} of them cached, and {self.output} of output; there "
                "must be more input than is cached, and at least 1 token of output"
            )

    @property
    def context(self) -> float:
        """Tokens in the cache, the mean while a request is decoded."""
        return self.input + self.output / 2


@dataclass(frozen=True)
class Service:
    """decode, on so many instances; prefill on others, or None: on the same ranks, between steps of decoding."""

    decode: Deployment
    instances: int = 1
    prefill: Deployment | None = None
    prefill_instances: int = 1

    @property
    def groups(self) -> int:
        """TP groups that decode."""
        return self.instances * self.decode.topology.groups

    @property
    def ranks(self) -> int:
        other = self.prefill_instances * self.prefill.ranks if self.prefill else 0
        return self.instances * self.decode.ranks + other


@dataclass(frozen=True)
class Outcome:
    """ttft, tpot: seconds, means; tokens: output tokens/s of the whole service; batch: requests that each TP group
    decodes; prefill_use: of prefill's time; step: one of decoding."""

    ttft: float
    tpot: float
    tokens: float
    batch: float
    prefill_use: float
    step: Step


def prefill_time(
    d: Deployment, work: Workload, p: Parameters | None = None, prompts: float | None = None
) -> float:
    """Seconds of a step in which each TP group computes so many prompts; None: as many as a full step has room for."""
    new = work.input - work.cached
    most = chunk(d)
    count = max(1.0, most // new) if prompts is None else prompts
    steps = max(1.0, count * new / most)
    step = prefill_step(d, Prefill(count * new / steps / d.topology.tp, work.input, work.cached), p)
    return step.seconds * steps


def prefill_rate(d: Deployment, work: Workload, p: Parameters | None = None) -> float:
    """Prompts/s of one instance that always has some waiting."""
    return _prefill_rate(replace(d, drafts=0, accepted=None), work, p)  # which change nothing in prefill


@lru_cache
def _prefill_rate(d: Deployment, work: Workload, p: Parameters | None) -> float:
    new = work.input - work.cached
    count = max(1.0, chunk(d) // new)
    filled = 1 / (1 + (p or d.card.reached).unevenness * highest(d.topology.groups))
    return filled * count * d.topology.groups / prefill_time(d, work, p, count)


def serve(service: Service, work: Workload, requests: float, p: Parameters | None = None) -> Outcome:
    """With so many requests in the service at any time, those in prefill among them (Little's law).

    Apart, prefill may be what limits: then decoding sees fewer requests than there are. Together, each token that is
    decoded brings its share of somebody's prompt. The batch is found by bisection.
    """
    if not requests > 0:
        raise InputError(f"{requests} requests at a time; there must be some")
    answer = steady(service, work, p)
    low, high = 0.0, requests / service.groups
    found = answer.at(high)
    for _ in range(40):
        present = found.batch * service.groups + found.tokens / work.output * found.ttft
        if abs(present - requests) < 1e-3 * requests or high - low < 1e-6 * high:
            break
        low, high = (low, found.batch) if present > requests else (found.batch, high)
        found = answer.at((low + high) / 2)
    return found


def steady(service: Service, work: Workload, p: Parameters | None = None) -> "Apart | Together":
    """What the service gives for any batch: `.at(requests that each TP group decodes)`."""
    return Apart(service, work, p) if service.prefill else Together(service, work, p)


class Apart:
    """Prefill on ranks of its own."""

    def __init__(self, service: Service, work: Workload, p: Parameters | None) -> None:
        assert service.prefill
        self.service, self.work, self.p = service, work, p
        self.alone = prefill_time(service.prefill, work, p, 1 / service.prefill.topology.groups)
        self.rate = service.prefill_instances * prefill_rate(service.prefill, work, p)

    def at(self, batch: float) -> Outcome:
        step = decode_step(self.service.decode, Decode(batch, self.work.context), self.p)
        tpot = step.seconds / accepted_tokens(self.service.decode)
        tokens = batch * self.service.groups / tpot
        use = tokens / self.work.output / self.rate
        return Outcome(ADMISSION + self.alone * _waiting(use), tpot, tokens, batch, use, step)


class Together:
    """Prefill between the steps of decoding, all groups at once."""

    def __init__(self, service: Service, work: Workload, p: Parameters | None) -> None:
        self.service, self.work, self.p = service, work, p
        self.prompt = service.decode.topology.groups / prefill_rate(service.decode, work, p)

    def at(self, batch: float) -> Outcome:
        step = decode_step(self.service.decode, Decode(batch, self.work.context), self.p)
        alone = step.seconds / accepted_tokens(self.service.decode)
        prefill = batch / self.work.output * self.prompt
        tpot, use = alone + prefill, prefill / (alone + prefill)
        tokens = batch * self.service.groups / tpot
        return Outcome(ADMISSION + step.seconds + self.prompt * _waiting(use), tpot, tokens, batch, use, step)


def _waiting(use: float) -> float:
    """Time in a queue and its server over that of the server alone: Poisson arrivals, equal jobs (M/D/1)."""
    return 1 + use / (2 * (1 - use)) if use < 1 else 1e9
