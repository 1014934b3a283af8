"""The announced result replayed: what is arithmetic is checked against arithmetic, the rest against its own law."""

import json
from dataclasses import replace

import pytest

from expertmesh.cli import main
from expertmesh.errors import InputError
from expertmesh.planner.costs import decode_step
from expertmesh.planner.deployment import Decode
from expertmesh.planner.memory import cache_bytes, most_requests, static_memory
from expertmesh.planner.news import Claim, News, beaten, claims
from expertmesh.planner.news.memory import counted_static
from expertmesh.planner.news.setting import FEW, MANY
from expertmesh.planner.serving import Workload

NEWS = News.of(Workload(3500, 1500))
FOUND = {claim.name: claim for claim in claims(NEWS)}


def figure(claim: Claim, *words: str) -> float:
    (value,) = (v for name, v in claim.figures.items() if all(word in name for word in words))
    return value


def finding(claim: Claim, *words: str) -> float:
    (value,) = (f.value for f in claim.findings if all(word in f.assumption for word in words))
    return value


def test_static_memory_is_that_of_the_announcement() -> None:
    """61 layers of 187.1 M of attention, 58 of 256 experts and a shared one of 44.04 M, 3 dense ones of 396 M, and
    embedding and head of 927 M in BF16."""
    found = counted_static(NEWS.model, [(16, 16), (8, 16), (1, 16), (8, 64), (1, 64)])
    assert [round(b / 1e9, 2) for b in found] == [42.05, 43.23, 59.73, 12.58, 29.08]
    for tp, cards in ((8, 16), (2, 64)):
        by_hand = 61 * 187.1e6 + 58 * 44.04e6 + 3 * 396e6 + 4 * 927e6
        expected = by_hand / tp + 58 * 256 / cards * 44.04e6
        assert counted_static(NEWS.model, [(tp, cards)])[0] == pytest.approx(expected, rel=1e-3)
    claim = FOUND["all static memory"]
    assert finding(claim, "split over TP8") == pytest.approx(0.29 - 1, abs=0.005)
    assert finding(claim, "DP16") == pytest.approx(0.21 - 1, abs=0.005)
    assert finding(claim, "whole on each card") == pytest.approx(0.34 - 1, abs=0.01)
    assert "DP16" in claim.verdict


def test_static_memory_of_this_engine_is_what_the_loader_would_hold() -> None:
    """Plus scales of W8A8, within 2% of the arithmetic without them."""
    claim = FOUND["all static memory"]
    for nodes, expected in ((FEW, 46.27), (MANY, 15.62)):
        total = sum(static_memory(NEWS.layout(nodes)).values()) / 1e9
        assert figure(claim, "in this engine", f"{nodes * 8} cards") == total
        assert total == pytest.approx(expected, rel=0.04) and total > expected


def test_routed_experts_are_a_quarter() -> None:
    claim = FOUND["routed experts' static memory"]
    assert claim.findings[0].value == pytest.approx(-0.75, abs=1e-12) and claim.verdict == "holds"
    assert figure(claim, "16 cards") == pytest.approx(40.87, rel=0.003)
    assert figure(claim, "64 cards") == pytest.approx(10.22, rel=0.003)


def test_cache_and_density() -> None:
    assert figure(FOUND["room for the cache"], "bytes a token") == 61 * 576 * 2 == 70_272
    assert FOUND["room for the cache"].findings[0].value == pytest.approx(3.45, rel=0.06)
    density = FOUND["tokens of an expert in a step"]
    assert density.findings[0].value == 4.0 and density.verdict == "holds"
    assert figure(density, "16 cards") == 128 * 16 * 8 / 256


def test_bytes_between_nodes_are_those_of_the_law() -> None:
    """A flat exchange sends 8 rows of 7168 BF16 numbers to and from nodes of which 7 of 8 are others."""
    claim = FOUND["bytes between nodes"]
    for where in ("stay", "anywhere"):
        flat = figure(claim, "flat", where)
        assert flat == pytest.approx(2 * 8 * 7 / 8 * 7168 * 2 / 1e3, rel=0.01)
        assert flat == pytest.approx(200.8, rel=0.01)
    saved = [
        finding(claim, text, "stay")
        for text in ("two tiers in BF16", "tiers, dispatch in INT8", "and combine")
    ]
    assert saved == pytest.approx([-0.50, -0.63, -0.75], abs=0.01)
    assert claim.verdict == "holds if two tiers, dispatch in INT8, groups of experts stay on their nodes"


def test_throughput_is_what_decode_steps_give() -> None:
    claim = FOUND["throughput of a card, memory full"]
    rates = []
    for nodes in (FEW, MANY):
        d = NEWS.layout(nodes)
        batch = most_requests(d, 4250)
        rates.append(batch / decode_step(d, Decode(batch, 4250)).seconds)
    assert finding(claim, "a flat exchange and experts in order") == pytest.approx(
        rates[1] / rates[0], rel=0.03
    )
    assert claim.announced == 3.2


def test_both_at_once_is_harder_than_each_alone() -> None:
    """Half the time of a token is nowhere with a full memory, where throughput is highest."""
    joint = FOUND["throughput with half the time of a token"]
    full = max(f.value for f in FOUND["throughput of a card, memory full"].findings)
    assert "not reached" in joint.verdict
    assert all(f.value < full for f in joint.findings)
    for tp in (8, 4, 2, 1):
        gain, time = (figure(joint, f"TP{tp},", what) for what in ("throughput, times", "time of a token"))
        assert gain < 3.2 or time > -50
        assert not joint.findings or gain > finding(joint, f"TP{tp}")


def test_more_requests_a_card_take_longer() -> None:
    latency = FOUND["time of a token at equal load"]
    for text in ("experts in order", "imbalance 1.1 on both", "all measures"):
        assert finding(latency, "in all", text) < finding(latency, "requests a card", text) < 0


def test_imbalance_depends_on_the_window() -> None:
    claim = FOUND["imbalance of cards"]
    windows = ("planned for, 64", "next window", "another workload, 64 redundant slots, rows")
    seen, later, other = (finding(claim, text) for text in windows)
    assert 0 <= seen < 0.1 and seen < later < other
    assert finding(claim, "no redundant slots") > seen
    assert finding(claim, "a step of 128", "each step's own counts") < 0.1


def test_the_cluster_gains_by_each_part() -> None:
    claim = FOUND["throughput of the cluster"]
    for when in ("decoding, memory full", "prefill in full steps"):
        assert figure(claim, when, "balance alone") > 0
    assert finding(claim, "prefill in full steps") > 0.3


def test_one_kernel_is_faster_than_many() -> None:
    claim = FOUND["time of what comes before attention"]
    assert all(-1 < f.value < -0.3 for f in claim.findings)
    slow = replace(NEWS, card=replace(NEWS.card, launch_us=10 * NEWS.card.launch_us))
    worse = next(c for c in claims(slow) if c.name == claim.name)
    assert all(a.value < b.value for a, b in zip(worse.findings, claim.findings, strict=True))


def test_what_is_not_built_says_so() -> None:
    assert FOUND["speed of rollouts of reinforcement learning"].verdict == "not built yet"


def test_another_layout_beats_the_announced_one() -> None:
    """Attention TP8 keeps each token of the cache eight times."""
    found, _ = beaten(NEWS, 0.1)
    best, announced = found[0], found[-1]
    assert announced.deployment.topology.tp == 8 and announced.gain == 1.0
    assert best.gain > 1.1 and best.deployment.topology.tp < 8
    assert best.outcome.tpot <= 0.1 and announced.outcome.tpot <= 0.1
    assert best.outcome.tokens == pytest.approx(best.gain * announced.outcome.tokens)
    assert best.outcome.batch <= most_requests(best.deployment, 4250)
    with pytest.raises(InputError, match="larger limit"):
        beaten(NEWS, 0.001)


def test_what_the_start_of_an_exchange_decides_is_said() -> None:
    """Half and twice of the card's estimate, where a verdict is another with one of them."""
    for name, found in FOUND.items():
        if not found.otherwise:
            continue
        assert list(found.otherwise) == ["90 us", "360 us"]
        others = [next(c for c in claims(NEWS.starting(us)) if c.name == name) for us in (90.0, 360.0)]
        assert list(found.otherwise.values()) == [other.verdict for other in others]
    assert FOUND["time of a token at equal load"].otherwise
    assert not FOUND["all static memory"].otherwise
    assert NEWS.starting(90.0).start_us == pytest.approx(90.0)


def test_requests_must_fit_on_sixteen_cards() -> None:
    with pytest.raises(InputError, match="give shorter ones"):
        News.of(Workload(1e6, 10))
    assert News.of(Workload(100_000, 10)).work.input * cache_bytes(NEWS.layout(FEW)) > 0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "replay-news", "--json", "--tpot", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c["claim"] for c in report["claims"]] == list(FOUND)
    assert report["claims"][0]["found"][0]["value"] == pytest.approx(-0.75)
    assert report["better"][0]["best"]["gain"] > 1
    assert main(["plan", "replay-news", "--tpot", "100"]) == 0
    text = capsys.readouterr().out
    for claim in FOUND.values():
        assert claim.name in text and claim.verdict in text
    assert main(["plan", "replay-news", "--tpot", "0"]) == 2
