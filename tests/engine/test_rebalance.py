"""Experts that move while requests go on: the same tokens, the right weights, and what happens when something fails."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm.local import cores
from expertmesh.engine import balancer as balancing
from expertmesh.engine.balancer import CHECK, FIRST, Balancer
from expertmesh.engine.engine import Engine
from expertmesh.engine.processes import PRELOAD
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.errors import RankFailure
from expertmesh.launch.forkserver import ForkServer
from expertmesh.launch.launcher import Here
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.migration import Move
from expertmesh.mesh.placement import EMPTY, Placement, default_placement
from expertmesh.mesh.traffic import algorithm
from expertmesh.model.moe import MoE
from expertmesh.weights import expert_bytes
from tests.support.reference import Pair, check_outputs, greedy, prompts_for
from tests.support.reference import engine as engine_of

TOPOLOGY = Topology(2, 2)
PROMPTS = ["Once upon a time", "class Stack:\n", "春望\n杜甫\n", "def main("]
PARAMS = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
NONE = {"failures": 0, "error": None}


def cluster(**options: Any) -> LLM:
    common = {"dtype": "float32", "redundant": 16, "rebalance": "every=4", "cache_tokens": 1024}
    return LLM(topology=TOPOLOGY, **(common | options))


def tokens(llm: LLM, prompts: Sequence[str] = PROMPTS, promptly: bool = True) -> list[list[int]]:
    """promptly: a plan is there at the step after the look, as the balancer does not wait for one."""
    out: dict[str, list[int]] = {}
    for output in llm.stream(prompts, PARAMS):
        out[output.request_id] = output.token_ids
        if promptly and llm.engine.balancer is not None:
            llm.engine.balancer.wait()
    return [out[key] for key in sorted(out, key=lambda k: int(k.rpartition("-")[2]))]


def report(llm: LLM) -> dict[str, Any]:
    assert llm.engine.balancer is not None
    return llm.engine.balancer.report()


@pytest.fixture(scope="module")
def alone() -> LLM:
    return LLM(dtype="float32", cache_tokens=1024)


@pytest.fixture(scope="module")
def expected(alone: LLM) -> list[list[int]]:
    return tokens(alone)


def slots_of(engine: Engine) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
    """Weights in each slot of each layer and rank."""
    assert isinstance(engine.ranks, ThreadRanks)
    return {
        (layer, rank, slot): (gate_up, down)
        for rank, runner in enumerate(engine.ranks.runners)
        for layer, (_, moe) in enumerate(runner.model.layers)
        if isinstance(moe, MoE)
        for slot, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down, strict=True))
    }


def check_weights(engine: Engine, placement: Placement, alone: LLM) -> None:
    """In each slot the checkpoint's expert that the placement says."""
    true = slots_of(alone.engine)
    for (layer, rank, slot), found in slots_of(engine).items():
        expert = int(placement.slots_LRS[placement.row_of(layer), rank, slot])
        if expert != EMPTY:
            for ours, theirs in zip(found, true[layer, 0, expert], strict=True):
                assert torch.equal(ours, theirs), (layer, rank, slot, expert)


def test_tokens_stay_the_same_while_experts_move(alone: LLM, expected: list[list[int]]) -> None:
    with cluster() as llm:
        engine = llm.engine
        assert engine.balancer is not None
        start = engine.balancer.placement
        assert tokens(llm) == expected
        state = report(llm)
        assert state["moved"] > 0 and state["swaps"] > 0 and state.items() >= NONE.items()
        size = expert_bytes(engine.model, "float32")
        assert state["moved_bytes"] >= state["moved"] * size
        placement = engine.balancer.placement
        assert not np.array_equal(placement.slots_LRS, start.slots_LRS)
        assert isinstance(engine.ranks, ThreadRanks)
        for runner in engine.ranks.runners:
            assert runner.mover._exchange.placement is placement
        sent = engine.ranks.sent()
        assert sum(one.across("weights") + one.in_node("weights") for one in sent) > 0
        check_weights(engine, placement, alone)
        assert tokens(llm) == expected
        check_weights(engine, engine.balancer.placement, alone)
    with cluster(rebalance="off") as llm:
        assert llm.engine.balancer is None and tokens(llm) == expected


@pytest.mark.parametrize("split", ["even", "last", "now"])
def test_experts_move_under_every_split_and_cut(split: str, alone: LLM, expected: list[list[int]]) -> None:
    with cluster(split=split, overlap="on") as llm:
        assert tokens(llm) == expected
        assert report(llm)["moved"] > 0 and llm.engine.balancer is not None
        check_weights(llm.engine, llm.engine.balancer.placement, alone)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer(PRELOAD) as server:
        yield server


def test_experts_move_between_processes(fork_server: ForkServer, expected: list[list[int]]) -> None:
    with cluster(ranks="processes", launcher=Here(PRELOAD, fork_server)) as llm:
        assert tokens(llm) == expected
        state = report(llm)
        assert state["moved"] > 0 and state.items() >= NONE.items()
        assert tokens(llm) == expected


# --- What fails


def test_a_wrong_checksum_leaves_the_placement_in_force(
    alone: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with cluster() as llm:
        engine, asked = llm.engine, list[Move]()
        assert engine.balancer is not None
        before, true = engine.balancer.placement, engine.ranks.checksums

        def wrong(moves: Sequence[Move]) -> list[tuple[int, int]]:
            asked.append(moves[-1])
            found = true(moves)
            return [*found[:-1], (found[-1][0], found[-1][1] ^ 1)]

        monkeypatch.setattr(engine.ranks, "checksums", wrong)
        with caplog.at_level(logging.WARNING):
            assert tokens(llm) == expected
        state, first = report(llm), asked[0]
        assert engine.balancer.placement is before
        assert state["failures"] == len(asked) > 0 and (state["moved"], state["swaps"]) == (0, 0)
        assert state["doing"] in ("watching", "planning", "moving")
        said = caplog.records[0].getMessage()
        assert f"expert {first.expert} of layer {first.layer} came to rank {first.rank} with checksum" in said
        assert f"on rank {first.source}; the placement stays as it was" in said
        check_weights(engine, before, alone)
        # And when the fault has gone, experts move.
        monkeypatch.undo()
        assert tokens(llm) == expected
        assert report(llm)["moved"] > 0
        check_weights(engine, engine.balancer.placement, alone)


def test_a_byte_that_is_lost_on_the_way_is_found(alone: LLM, expected: list[list[int]]) -> None:
    with cluster() as llm:
        assert isinstance(llm.engine.ranks, ThreadRanks)
        for runner in llm.engine.ranks.runners:
            mover, stage = runner.mover, runner.mover.stage

            def spoil(*what: Any, mover: Any = mover, stage: Callable[..., None] = stage) -> None:
                stage(*what)
                if mover._spare is not None:
                    mover._spare[0] ^= 1

            mover.stage = spoil  # type: ignore[method-assign]
        assert tokens(llm) == expected
        state = report(llm)
        assert state["failures"] > 0 and state["moved"] == 0
        assert llm.engine.balancer is not None
        check_weights(llm.engine, llm.engine.balancer.placement, alone)


def test_a_plan_that_cannot_be_made_is_a_failure_and_no_more(expected: list[list[int]]) -> None:
    def broken(*_: Any, **__: Any) -> Placement:
        raise ValueError("no idea")

    with cluster() as llm:
        assert llm.engine.balancer is not None
        plan, llm.engine.balancer._plan = llm.engine.balancer._plan, broken
        assert tokens(llm) == expected
        state = report(llm)
        assert state["failures"] > 1 and state["error"] == "planning failed: ValueError: no idea"
        assert state["moved"] == 0 and state["doing"] != "stopped"
        llm.engine.balancer._plan = plan
        assert tokens(llm) == expected and report(llm)["moved"] > 0


def test_what_else_goes_wrong_stops_the_balancer_alone(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with cluster() as llm:

        def broken() -> None:
            raise KeyError("loads")

        monkeypatch.setattr(llm.engine.ranks, "loads", broken)
        assert tokens(llm) == expected
        state = report(llm)
        assert state["doing"] == "stopped" and (state["failures"], state["looks"]) == (1, 0)
        assert state["error"] == "stopped: KeyError: 'loads'" and state["error"] in caplog.text
        monkeypatch.undo()
        assert tokens(llm) == expected and report(llm)["looks"] == 0


@pytest.mark.parametrize("part", ["stage", "commit"])
def test_a_rank_that_fails_while_experts_move_ends_the_engine(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have the new placement by then."""
    with cluster() as llm:
        assert isinstance(llm.engine.ranks, ThreadRanks)

        def broken(*_: Any) -> None:
            raise ValueError("out of order")

        monkeypatch.setattr(llm.engine.ranks.runners[2].mover, part, broken)
        for _ in range(2):
            with pytest.raises(
                RankFailure, match=r"rank 2 \(node 1, card 0\) on \S+ failed in .*out of order"
            ):
                tokens(llm)


def test_a_process_that_is_killed_while_experts_move_ends_the_engine(fork_server: ForkServer) -> None:
    with cluster(ranks="processes", launcher=Here(PRELOAD, fork_server)) as llm:
        stage, pids = llm.engine.ranks.stage, llm.engine.ranks.pids

        def killed(*what: Any) -> None:
            os.kill(pids[1], signal.SIGKILL)
            stage(*what)

        llm.engine.ranks.stage = killed  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(RankFailure, match=r"rank 1 \(node 0, card 1\) on .*SIGKILL"):
                tokens(llm)


@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_requests_come_and_go_while_experts_move(
    ranks: str, fork_server: ForkServer, expected: list[list[int]]
) -> None:
    """One begins, one is given up, another one ends."""
    options = {"launcher": Here(PRELOAD, fork_server)} if ranks == "processes" else {}
    with cluster(ranks=ranks, rebalance="every=2", **options) as llm:
        first = llm.stream(PROMPTS[:2], PARAMS)
        for _ in range(20):
            next(first)
        second = llm.stream(PROMPTS[2], PARAMS)
        for _ in range(20):
            next(second)
        second.close()
        assert tokens(llm, PROMPTS[3:]) == expected[3:]
        last = {o.request_id: o.token_ids for o in first}
        assert [last[key] for key in sorted(last)] == expected[:2]
        assert tokens(llm) == expected
        state = report(llm)
        assert state["moved"] > 0 and state.items() >= NONE.items()


# --- Memory


def test_spare_memory_is_counted_where_experts_may_move(tiny_folder: Path) -> None:
    def kinds(topology: Topology | None, **options: Any) -> tuple[Any, int]:
        with LLM(tiny_folder, topology=topology, **options) as llm:
            memory = llm.engine.ranks.memory
            return memory.kinds, memory.together

    for mode in ("auto", "every=3"):
        with_it, together = kinds(TOPOLOGY, rebalance=mode)
        without, less = kinds(TOPOLOGY, rebalance="off")
        assert with_it["spare"] > 0 and "spare" not in without
        assert with_it - without == {"spare": with_it["spare"]}
        assert together >= less + 4 * with_it["spare"]
        assert "spare" not in kinds(None, rebalance=mode)[0]


@pytest.mark.parametrize("mode", ["auto", "every=1"])
def test_nothing_to_balance(mode: str, tiny_folder: Path, pair_of: Callable[[str], Pair]) -> None:
    """One rank; a model without experts."""
    with LLM(tiny_folder, rebalance=mode) as llm:
        assert llm.engine.balancer is None and tokens(llm, ["a"])
    pair = pair_of("only_dense_layers")
    with engine_of(pair, topology=TOPOLOGY, rebalance=mode) as llm:
        assert llm.engine.balancer is None and "spare" not in llm.engine.ranks.memory.kinds
        check_outputs(pair, llm.generate(prompts_for(pair.vocabulary, (5,)), greedy(pair.vocabulary, 8)))


def test_ways_to_share_rows_out(tiny_folder: Path) -> None:
    """What the planner may try: nothing without replicas; no counts of the last step where no wire is waited for."""

    def ways(topology: Topology | None = TOPOLOGY, **options: Any) -> tuple[tuple[str, ...], ...]:
        with LLM(tiny_folder, topology=topology, **options) as llm:
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
            counted = sum(s.across("counts") + s.in_node("counts") for s in llm.engine.ranks.sent())
            found = tuple(llm.engine._splits(wire) for wire in (False, True))
            assert (counted > 0) == (found[0] != ("even",))
            return found

    assert ways(redundant=4) == (("now",), ("last", "now", "even"))
    for split in ("now", "last", "even"):
        assert ways(redundant=4, split=split) == ((split,),) * 2
    assert ways() == ways(split="now") == ways(None) == (("even",),) * 2


# --- The balancer, of ranks that only say what was asked of them

EXPERTS = 8


class Told:
    """Implements what a balancer needs of `Ranks`."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.log: list[tuple[Any, ...]] = []
        self.match = True
        self.resets = 0

    def loads(self) -> dict[int, Tensor]:
        return {layer: rows.clone() for layer, rows in self.counts.items()}

    def stage(self, moves: Sequence[Move], start: int, stop: int) -> None:
        self.log.append(("stage", tuple(moves), start, stop))

    def checksums(self, moves: Sequence[Move]) -> list[tuple[int, int]]:
        self.log.append(("checksums",))
        return [(7, 7 if self.match else 8)] * len(moves)

    def commit(self, moves: Sequence[Move], placement: Placement) -> None:
        self.log.append(("commit", tuple(moves), placement))


def layout_of(layers: Sequence[int] = (3, 4)) -> Layout:
    topology = Topology(1, 4, 1)
    return Layout(topology, default_placement(EXPERTS, layers, topology), algorithm("two_tier"))


def made(mode: str, ranks: Told, **options: Any) -> Balancer:
    common: dict[str, Any] = {"layout": layout_of(), "expert_bytes": 1000}
    return Balancer(mode, ranks, **(common | options))  # type: ignore[arg-type]


def skewed(rows: int = 1000) -> dict[int, Tensor]:
    """Experts 0 and 1, which are on one card, have most."""
    return {layer: torch.tensor([8, 8, 1, 1, 1, 1, 1, 1]) * rows for layer in (3, 4)}


def parted(loads: Loads, topology: Topology, redundant: int, old: Placement) -> Placement:
    """A plan: expert 1 changes places with expert 2."""
    slots = old.slots_LRS.copy()
    slots[:, 0], slots[:, 1] = [0, 2], [1, 3]
    return Placement(slots, old.experts, old.layers)


def steps(balancer: Balancer, count: int, seconds: float = 1.0) -> None:
    for _ in range(count):
        balancer.after_step(seconds, False)
        balancer.wait()


def test_auto_moves_what_pays() -> None:
    ranks = Told()
    ranks.counts = skewed()
    balancer = made("auto", ranks, plan=parted)
    before = balancer.placement
    steps(balancer, CHECK - 1)
    assert not ranks.log and balancer.report().items() >= {"looks": 0, "imbalance": None}.items()
    steps(balancer, 1)
    assert balancer.report()["doing"] == "planning" and balancer.report()["imbalance"] == 16 / 22 * 4
    steps(balancer, 20)
    state = balancer.report()
    assert state["doing"] == "watching" and state.items() >= NONE.items()
    # Two ranks in two layers, one expert a rank and round.
    assert (state["plans"], state["refused"], state["swaps"], state["moved"]) == (1, 0, 2, 4)
    assert state["moved_bytes"] == 4 * 1000 and state["imbalance"] == 9 / 22 * 4
    assert balancer.placement.layers == before.layers
    assert balancer.placement.slots_LRS[:, :2].tolist() == [[[0, 2], [1, 3]]] * 2
    assert ranks.log[-1][2] is balancer.placement
    balancer.close()


def test_auto_refuses_what_does_not_pay() -> None:
    """An expert so large, or steps so short, that moving takes longer than is gained."""
    for size, seconds in ((10**15, 1.0), (1000, 1e-12)):
        ranks = Told()
        ranks.counts = skewed()
        balancer = made("auto", ranks, plan=parted, expert_bytes=size)
        before = balancer.placement
        steps(balancer, CHECK + 20, seconds)
        state = balancer.report()
        assert (state["plans"], state["refused"], state["moved"]) == (1, 1, 0) and not ranks.log
        assert balancer.placement is before and state["doing"] == "watching"
        balancer.close()


def test_auto_does_not_plan_for_noise_and_moves_nothing_for_the_same() -> None:
    ranks = Told()
    ranks.counts = skewed(1)
    balancer = made("auto", ranks, plan=parted)
    steps(balancer, 3 * CHECK)
    assert balancer.report()["looks"] == 3 and balancer.report()["plans"] == 0
    balancer.close()
    ranks.counts = skewed()
    balancer = made("auto", ranks, plan=lambda loads, topology, redundant, old: old)
    steps(balancer, CHECK + 2)
    state = balancer.report()
    assert (state["plans"], state["refused"], state["moved"]) == (1, 0, 0) and not ranks.log
    balancer.close()


def test_an_expert_comes_over_several_steps_and_serves_when_all_of_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of no time leave the portion at its least."""
    monkeypatch.setattr(balancing, "FIRST", 300)
    ranks = Told()
    ranks.counts = skewed()
    balancer = made("every=2", ranks, plan=parted)
    before = balancer.placement
    balancer._portion = 300
    steps(balancer, 3, 0.0)
    for start, stop in ((0, 300), (300, 600), (600, 900), (900, 1000)):
        assert balancer.placement is before and balancer.report()["moved"] == 0
        steps(balancer, 1, 0.0)
        staged = [entry for entry in ranks.log if entry[0] == "stage"]
        assert staged[-1][2:] == (start, stop) and staged[-1][1] == staged[0][1]
    assert [entry[0] for entry in ranks.log] == ["stage"] * 4 + ["checksums", "commit"]
    assert balancer.placement is ranks.log[-1][2] is not before
    assert balancer.report()["moved"] == len(ranks.log[-1][1]) == 2
    steps(balancer, 1, 0.0)
    assert ranks.log[-1][2:] == (0, 300)  # the next round begins at its beginning
    balancer.close()


def test_a_move_after_one_that_failed_begins_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "FIRST", 600)
    ranks = Told()
    ranks.counts, ranks.match = skewed(), False
    balancer = made("every=2", ranks, plan=parted)
    balancer._portion = 600
    steps(balancer, 5, 0.0)
    assert balancer.report()["failures"] == 1 and balancer.report()["doing"] == "watching"
    ranks.match = True
    ranks.log.clear()
    steps(balancer, 20, 0.0)
    assert [entry[2:] for entry in ranks.log if entry[0] == "stage"] == [(0, 600), (600, 1000)] * 2
    assert balancer.report()["moved"] == 4
    balancer.close()


def test_portions_grow_with_the_time_of_a_step() -> None:
    ranks = Told()
    ranks.counts = skewed()
    balancer = made("every=1", ranks, plan=parted, expert_bytes=100 * FIRST)
    steps(balancer, 12, 1e6)
    sizes = [entry[3] - entry[2] for entry in ranks.log if entry[0] == "stage"]
    assert sizes[:5] == [FIRST << n for n in range(5)]
    balancer.close()


def test_loads_of_a_window_and_after_a_reset() -> None:
    """Half of what was known remains at a look; counts that start from 0 again are all new."""
    ranks, seen = Told(), list[np.ndarray]()

    def plan(loads: Loads, topology: Topology, redundant: int, old: Placement) -> Placement:
        seen.append(loads.total_LE[0])
        return old

    ranks.counts = skewed(100)
    balancer = made("every=1", ranks, plan=plan)
    one = np.array([8, 8, 1, 1, 1, 1, 1, 1])
    steps(balancer, 2)  # a look, and what comes of it
    ranks.counts = skewed(130)
    steps(balancer, 2)
    ranks.counts, ranks.resets = skewed(40), 1
    steps(balancer, 2)
    ranks.counts, ranks.resets = {}, 2  # and no step since
    steps(balancer, 2)
    ranks.counts = skewed(60)
    steps(balancer, 2)
    ranks.counts, ranks.resets = skewed(90), 3  # more than before
    steps(balancer, 2)
    expected, known = [], 0.0
    for new in (100, 30, 40, 0, 60, 90):
        known = known / 2 + new
        expected.append(known * one)
    np.testing.assert_allclose(seen, expected)
    assert balancer.report()["looks"] == 6
    balancer.close()


@pytest.mark.parametrize("split", [False, True])
def test_cards_are_judged_as_rows_were_shared_out_most_of_the_time(split: bool) -> None:
    """Four cards have all experts: level when rows are split; by even shares too."""
    slots = np.array([[[0, 1], [0, 2], [3, EMPTY], [3, EMPTY]]])
    layout = Layout(Topology(1, 4, 1), Placement(slots, 4, (3,)), algorithm("two_tier"))
    ranks = Told()
    ranks.counts = {3: torch.tensor([40, 40, 0, 80])}
    balancer = made("every=3", ranks, layout=layout, plan=lambda loads, topology, redundant, old: old)
    for number in range(3):
        balancer.after_step(1.0, split if number else not split)
    assert balancer.report()["imbalance"] == (1.0 if split else 60 / 40)
    balancer.close()


def test_the_way_to_a_placement_is_found_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found, rounds = list[str](), balancing.rounds

    def noted(*what: Any) -> Any:
        found.append(threading.current_thread().name)
        return rounds(*what)

    monkeypatch.setattr(balancing, "rounds", noted)
    ranks = Told()
    ranks.counts = skewed()
    balancer = made("every=1", ranks, plan=parted)
    steps(balancer, 10)
    assert found and all(name.startswith("balancer") for name in found)
    balancer.close()


def test_planning_ends_soon_after_the_engine() -> None:
    """With the layers that it is at."""
    ranks, begun, go, planned = Told(), threading.Event(), threading.Event(), list[int]()
    layers = range(8 * cores() + 16)
    ranks.counts = {layer: torch.ones(EXPERTS) for layer in layers}

    def plan(loads: Loads, topology: Topology, redundant: int, old: Placement) -> Placement:
        assert loads.layers == old.layers
        planned.extend(loads.layers)
        begun.set()
        go.wait(60)
        return old

    balancer = made("every=1", ranks, plan=plan, layout=layout_of(layers))
    balancer.after_step(1.0, False)
    assert begun.wait(60)
    balancer.close()
    go.set()
    balancer.wait()
    assert len(planned) < len(layers) / 2
    balancer = made("every=1", ranks, plan=plan, layout=layout_of(layers))
    planned.clear()
    steps(balancer, 2)
    assert planned == list(layers) and balancer.report()["plans"] == 1
    balancer.close()


def test_a_plan_that_cannot_be_reached_is_a_failure_and_no_more() -> None:
    """More slots than the ranks have memory for."""

    def wide(loads: Loads, topology: Topology, redundant: int, old: Placement) -> Placement:
        slots = np.tile(np.arange(EXPERTS), (2, 4, 1))
        return Placement(slots, old.experts, old.layers)

    ranks = Told()
    ranks.counts = skewed()
    balancer = made("every=1", ranks, plan=wide)
    before = balancer.placement
    steps(balancer, 6)
    state = balancer.report()
    assert state["failures"] > 1 and state["error"].startswith("planning failed: ")
    assert balancer.placement is before and not ranks.log and state["doing"] != "stopped"
    balancer.close()


def test_planning_does_not_hold_up_the_steps() -> None:
    ranks, go = Told(), threading.Event()
    ranks.counts = skewed()

    def plan(loads: Loads, topology: Topology, redundant: int, old: Placement) -> Placement:
        go.wait(60)
        return parted(loads, topology, redundant, old)

    balancer = made("every=1", ranks, plan=plan)
    for _ in range(10):
        balancer.after_step(1.0, False)
    assert balancer.report()["doing"] == "planning" and balancer.report()["looks"] == 1
    go.set()
    steps(balancer, 10)
    assert balancer.report()["moved"] == 4
    balancer.close()
