"""DeepEP's buffer as an exchange: through a stand-in that takes what its documentation says and nothing else."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.cards import deepep
from expertmesh.comm.cards.deepep import DeepEPExchange
from expertmesh.comm.cards.native import StepShape
from expertmesh.comm.local import LocalWorld
from expertmesh.errors import InputError
from expertmesh.mesh.placement import default_placement
from tests.comm.cards.deepep_buffer import Buffer
from tests.comm.cards.native_cases import ExactCase, run, tiered
from tests.comm.cards.world import CardWorld

V3 = StepShape(7168, 8, 4096, torch.bfloat16)
FEW = 6


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Any:
    """Memory of low-latency mode is for the most that can come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepep, "FEW", FEW)
        yield


def case_of(topology: Topology, redundant: int, rows: list[int], seed: int) -> ExactCase:
    return ExactCase(default_placement(8, [0], topology, redundant), topology, rows, 4, 2048, seed)


@settings(max_examples=10)
@given(
    st.sampled_from([Topology(1, 2), Topology(1, 4), Topology(2, 2)]),
    st.integers(0, 5),
    st.integers(0, 999),
    st.data(),
)
def test_rows_and_sums_are_those_of_our_exchange(
    topology: Topology, redundant: int, seed: int, data: st.DataObject
) -> None:
    """In both modes, one after the other and back again: with replicas and empty slots, ragged rows and none."""
    size = topology.ranks
    rows = data.draw(st.lists(st.integers(0, FEW - 1), min_size=size, max_size=size))
    case = case_of(topology, redundant, rows, seed)
    buffers: dict[int, Buffer] = {}

    def make(comm: Comm) -> DeepEPExchange:
        buffers[comm.rank] = Buffer(comm, FEW)
        return DeepEPExchange(comm, case.placement, buffers[comm.rank])

    found = run(case, make, [FEW - 1, FEW, FEW - 1])
    for (backs, came), ((wanted,), expected) in zip(found, tiered(case), strict=True):
        assert all(torch.equal(back, wanted) for back in backs)
        assert came == {key: 3 * count for key, count in expected.items()}
    assert all(buffer.modes == ["low latency", "normal", "low latency"] for buffer in buffers.values())


@pytest.mark.parametrize("most", [FEW - 1, FEW])
def test_rows_in_fp8_are_near(most: int) -> None:
    case = case_of(Topology(1, 4), 2, [3, 1, 0, 5], 1)
    found = run(case, lambda comm: DeepEPExchange(comm, case.placement, Buffer(comm, FEW), fp8=True), [most])
    for ((back,), _), ((wanted,), _) in zip(found, tiered(case), strict=True):
        assert back.shape == wanted.shape
        assert float((back.float() - wanted.float()).norm()) <= 0.04 * float(wanted.float().norm())


@pytest.mark.parametrize("most", [FEW - 1, FEW])
def test_the_other_micro_batch_computes_while_rows_travel(most: int) -> None:
    case = case_of(Topology(1, 2), 0, [2, 3], 1)

    def program(comm: Comm) -> list[str]:
        exchange, said = DeepEPExchange(comm, case.placement, Buffer(comm, FEW)), []
        exchange.prepare(1, "even", most)
        x, experts, weights = case.of(comm.rank)

        def micro_batch(name: str) -> None:
            received = exchange.dispatch(0, x, experts, weights)
            said.append(name)
            exchange.combine(case.expert(received, comm.rank), received)

        comm.turns.run([lambda: micro_batch("a"), lambda: said.append("b computes") or micro_batch("b")])  # type: ignore[func-returns-value]
        return said

    assert LocalWorld(case.topology, 60).run(program) == [["b computes", "a", "b"]] * 2


@pytest.mark.parametrize(
    ("shape", "topology", "problem"),
    [
        (V3, Topology(1, 3, 1), "3 ranks, not 2, 4, 8, 16, 24"),
        (V3, Topology(4, 4, 4), "4 cards of a node, not 8 where there are several: change cards"),
        (replace(V3, dtype=torch.float32), Topology(1, 8, 8), "rows are float32, and have to be bfloat16: set dtype"),
        (replace(V3, hidden=7680), Topology(1, 8, 8), "rows of 7680 numbers, not 2048, 2560"),
        (replace(V3, choices=10), Topology(1, 8, 8), "10 experts of a token, at most 9"),
    ],
)  # fmt: skip
def test_a_limit_is_named_with_what_would_fit(shape: StepShape, topology: Topology, problem: str) -> None:
    deepep.check(V3, Topology(4, 8, 8))
    with pytest.raises(InputError) as refused:
        deepep.check(shape, topology)
    assert problem in str(refused.value) and "\n" not in str(refused.value)


def test_it_connects_with_buffers_for_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Given(SimpleNamespace):
        def __init__(self, group: Any, **sizes: Any) -> None:
            made.append((group.size(), sizes))

        @staticmethod
        def get_dispatch_config(ranks: int) -> Any:
            return SimpleNamespace(
                get_nvl_buffer_size_hint=lambda size, n: size * n, get_rdma_buffer_size_hint=lambda size, n: 1
            )

        get_combine_config = get_dispatch_config

        @staticmethod
        def get_low_latency_rdma_size_hint(most: int, hidden: int, ranks: int, experts: int) -> int:
            return most * hidden * ranks * experts

    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=Given))
    topology = Topology(1, 2, 1)

    def program(comm: Any) -> Any:
        return deepep.connect(comm, default_placement(8, [0], topology), replace(V3, choices=2), "deepep_fp8")

    assert all(exchange._fp8 for exchange in CardWorld(topology).run(program))
    sizes = {"num_nvl_bytes": 2 * 2 * 7168, "num_rdma_bytes": FEW * 7168 * 2 * 8}
    assert made == [(2, sizes | {"low_latency_mode": True, "num_qps_per_rank": 4})] * 2


def test_without_deep_ep_one_line_says_so() -> None:
    def program(comm: Any) -> None:
        deepep.connect(comm, default_placement(4, [0], comm.topology), V3, "deepep")

    with pytest.raises(InputError, match=r"exchange deepep needs deep_ep, .*; take two_tier"):
        CardWorld(Topology(1, 1)).run(program)
