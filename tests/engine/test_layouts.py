"""The same tokens and logits on any cluster as on one rank (a law of the design), ranks being threads."""

from collections.abc import Callable
from typing import Any

import pytest

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.llm import demo_model
from tests.support.reference import Pair, check_outputs, engine, greedy, prompts_for

PairOf = Callable[[str], Pair]
# nodes, cards, attention TP
CLUSTERS = [
    (1, 1, 1), (1, 4, 1), (1, 4, 4), (2, 2, 2), (2, 4, 1), (2, 4, 2), (4, 4, 4), (3, 5, 1), (2, 3, 1), (8, 8, 4),
]  # fmt: skip
LENGTHS = (1, 5, 33, 80, 2)


def small(pair: Pair, cluster: tuple[int, int, int], **options: Any) -> LLM:
    return engine(pair, topology=Topology(*cluster), page_size=8, **options)


@pytest.mark.parametrize("exchange", ["flat", "two_tier"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_cluster_gives_the_reference_tokens(
    cluster: tuple[int, int, int], exchange: str, pair_of: PairOf
) -> None:
    pair = pair_of("v3_eight_groups")
    with small(pair, cluster, exchange=exchange) as llm:
        check_outputs(
            pair,
            llm.generate(prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, 24, prompt=True)),
        )


@pytest.mark.parametrize(
    "variant", ["v3", "kimi_k2", "moonlight", "v2", "v2_lite", "v2_tied", "v2_norm_ignored"]
)
def test_variants_on_a_cluster(variant: str, pair_of: PairOf) -> None:
    pair = pair_of(variant)
    with small(pair, (2, 2, 2)) as llm:
        check_outputs(
            pair,
            llm.generate(prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, 24, prompt=True)),
        )


@pytest.mark.parametrize("redundant", [1, 5, 16])
@pytest.mark.parametrize("exchange", ["flat", "two_tier"])
def test_replicas(redundant: int, exchange: str, pair_of: PairOf) -> None:
    pair = pair_of("v3_eight_groups")
    with small(pair, (2, 4, 2), exchange=exchange, redundant=redundant) as llm:
        check_outputs(pair, llm.generate(prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, 24)))


@pytest.mark.parametrize("prompts", [1, 3, 11])
def test_groups_without_rows_step_with_the_others(prompts: int, pair_of: PairOf) -> None:
    """More groups than requests, and requests that end at different times."""
    pair = pair_of("v3_eight_groups")
    with small(pair, (2, 4, 1)) as llm:
        asked = prompts_for(pair.vocabulary, range(1, prompts + 1))
        params = [greedy(pair.vocabulary, 3 + 5 * i) for i in range(prompts)]
        check_outputs(pair, llm.generate(asked, params))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_prefix_cache_and_preemption(chunk: int, pair_of: PairOf) -> None:
    pair = pair_of("v3_eight_groups")
    with small(pair, (2, 2, 2), chunk=chunk, cache_tokens=136) as llm:
        prompts = prompts_for(pair.vocabulary, (33, 50, 60, 64))
        first = llm.generate(prompts, greedy(pair.vocabulary, 40))
        assert llm.engine.scheduler.preemptions > 0
        again = llm.generate(prompts[:2], greedy(pair.vocabulary, 40))
        check_outputs(pair, [*first, *again])


def test_a_conversation_finds_its_group_again(pair_of: PairOf) -> None:
    pair = pair_of("v3_eight_groups")
    with small(pair, (2, 4, 2)) as llm:
        prompts = prompts_for(pair.vocabulary, (40, 41, 42))
        llm.generate(prompts, greedy(pair.vocabulary, 2))
        for prompt in prompts:
            (output,) = llm.generate([prompt], greedy(pair.vocabulary, 2))
            assert output.cached_tokens == (len(prompt) - 1) // 8 * 8


def test_one_layout_gives_the_same_bits_each_time(pair_of: PairOf) -> None:
    pair = pair_of("v3_eight_groups")
    found = []
    for _ in range(2):
        with small(pair, (2, 4, 2), redundant=4) as llm:
            outputs = llm.generate(prompts_for(pair.vocabulary, LENGTHS), greedy(pair.vocabulary, 12))
            found.append([(o.token_ids, o.logprobs) for o in outputs])
    assert found[0] == found[1]


def test_64_ranks_run_the_demo_model() -> None:
    prompts = ["Once upon a time", "class Stack:\n", "春望\n杜甫\n"]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    alone = LLM(dtype="float32").generate(prompts, params)
    assert demo_model().is_dir()
    with LLM(dtype="float32", topology=Topology(8, 8), redundant=64) as llm:
        assert llm.engine.layout.topology.tp == 8
        outputs = llm.generate(prompts, params)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
        rows = sum(len(o.prompt_token_ids) + len(o.token_ids) - 1 for o in outputs)
        loads = llm.engine.ranks.loads()
        assert {int(counts.sum()) for counts in loads.values()} == {rows * 8}


def test_random_numbers_do_not_depend_on_the_cluster(pair_of: PairOf) -> None:
    pair = pair_of("v3_eight_groups")
    params = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    found = []
    for cluster in [(1, 1, 1), (2, 2, 2), (2, 4, 1)]:
        with small(pair, cluster) as llm:
            found.append(
                [o.token_ids for o in llm.generate(prompts_for(pair.vocabulary, (3, 9, 20)), params)]
            )
    assert found[0] == found[1] == found[2]
