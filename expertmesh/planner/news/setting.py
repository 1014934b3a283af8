"""What was announced, as deployments that can be planned."""

from dataclasses import dataclass, replace

from expertmesh.config import ModelConfig
from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import Card, card
from expertmesh.planner.costs import Step, decode_step, prefill_step
from expertmesh.planner.deployment import Decode, Deployment, Prefill
from expertmesh.planner.memory import cache_bytes, room
from expertmesh.planner.models import model
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.serving import CHUNK, Workload

FEW, MANY, CARDS, TP = 2, 8, 8, 8  # nodes before and after, cards of each, and attention TP inside a node
IMBALANCE = 1.1  # "less than 10%", as a maximum over the mean
STEP_TOKENS = 128  # of a card
MEASURES = f"measures are two tiers with dispatch in INT8, imbalance {IMBALANCE} and overlap where it gains"
Pair = tuple[Deployment, Deployment]


@dataclass(frozen=True)
class News:
    """What was announced, on which cards, for which requests; the announcement names neither their lengths nor their
    number."""

    model: ModelConfig
    card: Card
    work: Workload
    p: Parameters | None = None

    @staticmethod
    def of(work: Workload, p: Parameters | None = None) -> "News":
        """DeepSeek-V3 on Ascend 910B; which Ascend it was is not announced. InputError where not one request fits on
        16 cards."""
        news = News(model("deepseek-v3"), card("ascend-910b"), work, p)
        most = room(news.layout(FEW), 0) // cache_bytes(news.layout(FEW))
        if not work.context <= most:
            raise InputError(
                f"requests of {work.input:g} tokens and {work.output:g} of output, but a TP group of 16 cards has room "
                f"for {most:,.0f} tokens; give shorter ones"
            )
        return news

    @property
    def start_us(self) -> float:
        """Of an exchange there and back, without rows."""
        return self.card.dispatch_us + self.card.combine_us

    def starting(self, us: float) -> "News":
        """The same where an exchange takes so long without rows."""
        times = us / self.start_us
        names = ("dispatch_us", "combine_us")
        return replace(self, card=replace(self.card, **{n: times * getattr(self.card, n) for n in names}))

    def layout(
        self, nodes: int, exchange: str = "flat", tp: int = TP, balanced: bool = False, overlap: bool = False
    ) -> Deployment:
        """In W8A8. balanced: the fullest card's rows are `IMBALANCE` times the mean, else experts are in order."""
        return Deployment(
            self.model, self.card, Topology(nodes, CARDS, tp), weight_precision="int8", exchange=exchange,
            overlap=overlap, balance="known" if balanced else "none", imbalance=IMBALANCE if balanced else None,
        )  # fmt: skip

    def pairs(self) -> dict[str, Pair]:
        """16 and 64 cards by what is assumed of them, see `MEASURES`."""
        few, many = self.layout(FEW), self.layout(MANY)
        return {
            "a flat exchange and experts in order on both": (few, many),
            f"a flat exchange and imbalance {IMBALANCE} on both": (
                self.layout(FEW, balanced=True),
                self.layout(MANY, balanced=True),
            ),
            "all measures on 64 cards, none on 16": (few, self.announced()),
        }

    def announced(self, tp: int = TP) -> Deployment:
        """64 cards with all that was announced; overlap only where it gains with the memory full."""
        plain = self.layout(MANY, "two_tier_int8", tp, balanced=True)
        return max(plain, replace(plain, overlap=True), key=self.full_rate)

    def full(self, d: Deployment, workspace: float = 0.0) -> tuple[float, Step]:
        """Requests of a TP group that fill the memory, and a step of decoding with them. workspace: rows of a card's
        largest step, prefill's among them, for which memory is kept."""
        batch = max(1.0, room(d, workspace) // (self.work.context * cache_bytes(d)))
        return batch, self.step(d, batch)

    def step(self, d: Deployment, batch: float) -> Step:
        return decode_step(d, Decode(batch, self.work.context), self.p)

    def full_rate(self, d: Deployment, workspace: float = 0.0) -> float:
        """Tokens/s of a card with the memory full."""
        batch, step = self.full(d, workspace)
        return batch / step.seconds / d.topology.tp

    def prefill_rate(self, d: Deployment) -> float:
        """Tokens/s of a card, in full steps."""
        return CHUNK / prefill_step(d, Prefill(CHUNK, self.work.input), self.p).seconds

    @property
    def lengths(self) -> str:
        return f"{self.work.input:g} tokens of input and {self.work.output:g} of output"


def change(before: float, after: float) -> float:
    """-0.5 for half."""
    return after / before - 1
