"""The same tokens and logits when one half of a step computes while rows of the other travel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from expertmesh import LLM, Output, Topology
from expertmesh.engine.processes import PRELOAD
from expertmesh.launch.forkserver import ForkServer
from expertmesh.launch.launcher import Here
from tests.support.reference import TOLERANCE, Pair, check_outputs, engine, greedy, prompts_for

PairOf = Callable[[str], Pair]
# nodes, cards, attention TP
CLUSTERS = [(1, 2, 1), (2, 2, 2), (2, 3, 1), (4, 2, 2)]


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer(PRELOAD) as server:
        yield server


@pytest.fixture(params=["threads", "processes"])
def cluster_of(request: pytest.FixtureRequest, fork_server: ForkServer) -> Callable[..., LLM]:
    def make(pair: Pair, cluster: tuple[int, int, int], **options: Any) -> LLM:
        common = {"page_size": 8, "cache_tokens": 512, "ranks": request.param}
        launcher = Here(PRELOAD, fork_server) if request.param == "processes" else None
        return engine(pair, topology=Topology(*cluster), launcher=launcher, **(common | options))

    return make


def same(found: list[Output], expected: list[Output]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        for ours, theirs in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("exchange", ["flat", "two_tier"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_overlap_gives_the_reference_tokens(
    cluster: tuple[int, int, int], exchange: str, pair_of: PairOf, cluster_of: Callable[..., LLM]
) -> None:
    """Prompts in chunks, so that a cut goes through them at any place, and others that decode beside them."""
    pair = pair_of("v3_eight_groups")
    prompts = prompts_for(pair.vocabulary, (1, 5, 33, 80, 2))
    params = [greedy(pair.vocabulary, 8 + 3 * n, prompt=True) for n in range(len(prompts))]
    found = {}
    for overlap in ("on", "off"):
        with cluster_of(pair, cluster, exchange=exchange, overlap=overlap, chunk=13) as llm:
            found[overlap] = llm.generate(prompts, params)
            assert len({len(o.token_ids) for o in found[overlap]}) == len(prompts)
    check_outputs(pair, found["on"])
    same(found["on"], found["off"])


def test_one_request_of_one_row_and_groups_without_any(
    pair_of: PairOf, cluster_of: Callable[..., LLM]
) -> None:
    """A half without rows, on one rank or on all, steps with the others."""
    pair = pair_of("v3_eight_groups")
    with cluster_of(pair, (2, 2, 1), overlap="on") as llm:
        for lengths in ((1,), (2,), (1, 1, 1), (9,), (1, 30)):
            check_outputs(
                pair, llm.generate(prompts_for(pair.vocabulary, lengths), greedy(pair.vocabulary, 5))
            )


@pytest.mark.parametrize("overlap", ["on", "auto"])
def test_preemption_and_cached_beginnings(
    overlap: str, pair_of: PairOf, cluster_of: Callable[..., LLM]
) -> None:
    """Halves of one request are written to the cache, and lost with it, like a whole."""
    pair = pair_of("v3_eight_groups")
    with cluster_of(pair, (2, 2, 2), overlap=overlap, chunk=7, cache_tokens=136) as llm:
        prompts = prompts_for(pair.vocabulary, (33, 50, 60, 64))
        first = llm.generate(prompts, greedy(pair.vocabulary, 40, prompt=True))
        assert llm.engine.scheduler.preemptions > 0
        again = llm.generate(prompts[:2], greedy(pair.vocabulary, 40))
        check_outputs(pair, [*first, *again])


def test_one_layout_gives_the_same_bits_each_time(pair_of: PairOf, cluster_of: Callable[..., LLM]) -> None:
    pair = pair_of("v3_eight_groups")
    found = []
    for _ in range(2):
        with cluster_of(pair, (2, 2, 2), overlap="on") as llm:
            outputs = llm.generate(prompts_for(pair.vocabulary, (3, 20, 7)), greedy(pair.vocabulary, 8))
            found.append([(o.token_ids, o.logprobs) for o in outputs])
    assert found[0] == found[1]
