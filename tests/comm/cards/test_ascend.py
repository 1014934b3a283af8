"""Ascend's fused ops as an exchange: through a stand-in that takes what their documentation says and nothing else."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from expertmesh import Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.cards import ascend
from expertmesh.comm.cards.ascend import AscendExchange, Chip, chip_of, way_of
from expertmesh.comm.cards.native import StepShape
from expertmesh.errors import InputError
from expertmesh.mesh.placement import default_placement
from tests.comm.cards.ascend_ops import FusedOps
from tests.comm.cards.native_cases import ExactCase, run, tiered
from tests.comm.cards.world import CardWorld

V3 = StepShape(7168, 8, 256, torch.bfloat16)
WIDTH = {"hierarchy": 32, "fullmesh": 64, "fullmesh_v1": 1024, "fullmesh_v2": 1024}
# Rows that int8 carries exactly would need the largest number to be 127; those of one value are near enough.
SETTINGS = [
    ("A2", "hierarchy", Topology(2, 8)),
    ("A2", "fullmesh", Topology(1, 5)),
    ("A3", "fullmesh_v1", Topology(1, 8)),
    ("A3", "fullmesh_v2", Topology(2, 3)),
]


def exchange_of(comm: Comm, case: ExactCase, chip: Chip, name: str, int8: bool = False) -> AscendExchange:
    (way,) = [way for way in ascend.WAYS[chip] if way.name == name]
    shape = StepShape(case.width, case.choices, max(1, *case.rows), torch.bfloat16)
    assert way.problems(shape, case.topology, case.placement.slots_per_rank) == []
    return AscendExchange(comm, case.placement, way, FusedOps(comm, chip, "ep"), "ep", int8)


def case_of(topology: Topology, name: str, redundant: int, rows: list[int], seed: int) -> ExactCase:
    placement = default_placement(2 * topology.ranks, [0], topology, redundant)
    return ExactCase(placement, topology, rows, 4, WIDTH[name], seed)


@settings(max_examples=12)
@given(st.sampled_from(SETTINGS), st.integers(0, 7), st.integers(0, 999), st.data())
def test_rows_and_sums_are_those_of_our_exchange(
    setting: tuple[Chip, str, Topology], redundant: int, seed: int, data: st.DataObject
) -> None:
    """With replicas and empty slots, ragged rows, and ranks without any, whose stand-in nobody sees."""
    chip, name, topology = setting
    size = {"min_size": topology.ranks, "max_size": topology.ranks}
    rows = data.draw(st.lists(st.integers(0, 4), **size))  # type: ignore[arg-type]
    case = case_of(topology, name, redundant, rows, seed)
    for (found, came), (wanted, expected) in zip(
        run(case, lambda comm: exchange_of(comm, case, chip, name), [max(rows), 5]), tiered(case), strict=True
    ):
        assert all(torch.equal(back, wanted[0]) for back in found)
        # A stand-in row of ones has come twice to slots of its own rank.
        ours = {key: 2 * count for key, count in expected.items()}
        assert {key: came[key] for key in ours} == ours
        assert all(set(row) == {1.0} for row, slot in came if (row, slot) not in ours)


@pytest.mark.parametrize(("chip", "name", "topology"), SETTINGS[1:])
def test_int8_rows_are_near(chip: Chip, name: str, topology: Topology) -> None:
    case = case_of(topology, name, 2, [3] * topology.ranks, 1)
    found = run(case, lambda comm: exchange_of(comm, case, chip, name, int8=True))
    for ((back,), _), ((wanted,), _) in zip(found, tiered(case), strict=True):
        error = float((back.float() - wanted.float()).norm() / wanted.float().norm())
        assert 0 < error < 0.02


@pytest.mark.parametrize(
    ("chip", "shape", "topology", "per_rank", "name"),
    [
        ("A2", V3, Topology(4, 8, 8), 8, "hierarchy"),
        ("A2", V3, Topology(1, 8, 8), 24, "fullmesh"),
        ("A2", V3, Topology(16, 8, 8), 2, "fullmesh"),
        ("A3", V3, Topology(9, 16, 8), 2, "fullmesh_v2"),
        ("A3", replace(V3, rows=512), Topology(9, 16, 8), 2, "fullmesh_v1"),
        ("A3", replace(V3, choices=16), Topology(9, 16, 8), 2, "fullmesh_v1"),
    ],
)
def test_the_way_of_a_chip_that_fits(
    chip: Chip, shape: StepShape, topology: Topology, per_rank: int, name: str
) -> None:
    assert way_of(chip, shape, topology, per_rank).name == name


@pytest.mark.parametrize(
    ("chip", "shape", "topology", "per_rank", "problem"),
    [
        ("A2", replace(V3, rows=300), Topology(4, 8, 8), 8,
         "300 rows of a rank in a step, at most 256: set max_batch_tokens to 2048"),
        ("A3", replace(V3, rows=513), Topology(4, 8, 4), 8,
         "513 rows of a rank in a step, at most 512: set max_batch_tokens to 2048"),
        ("A2", V3, Topology(3, 8, 8), 8,
         "24 ranks, not 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256: change nodes or cards"),
        ("A2", V3, Topology(1, 8, 8), 32, "32 slots of a rank, at most 24: more ranks, or a lower redundant"),
        ("A2", replace(V3, hidden=7184), Topology(4, 8, 8), 8, "rows of 7184 numbers, not 32 to 10240 in steps of 32"),
        ("A3", replace(V3, hidden=512), Topology(4, 8, 8), 8, "rows of 512 numbers, not 1024 to 8192 in steps of 1"),
        ("A3", replace(V3, choices=17), Topology(4, 8, 8), 8, "17 experts of a token, at most 1"),
        ("A3", V3, Topology(1, 1, 1), 8, "1 ranks, not 2 to 768: change nodes or cards"),
        ("A3", V3, Topology(16, 16, 8), 5, "1280 slots in all, at most 1024: a lower redundant"),
        ("A3", replace(V3, dtype=torch.float32), Topology(4, 8, 8), 8,
         "float32, and have to be bfloat16: set dtype bfloat16"),
    ],
)  # fmt: skip
def test_a_limit_is_named_with_what_would_fit(
    chip: Chip, shape: StepShape, topology: Topology, per_rank: int, problem: str
) -> None:
    with pytest.raises(InputError) as refused:
        way_of(chip, shape, topology, per_rank)
    said = str(refused.value)
    assert problem in said and said.startswith("exchange npu_distribute (") and f"on Ascend {chip}" in said
    assert said.endswith("or take exchange two_tier, without these limits") and "\n" not in said


def test_chips_by_the_names_that_drivers_give() -> None:
    assert [chip_of(name) for name in ("Ascend910B3", "Ascend910_9392")] == ["A2", "A3"]
    with pytest.raises(InputError, match="not on Ascend310P3"):
        chip_of("Ascend310P3")


def test_sizes_of_the_buffer_are_those_of_the_documentation() -> None:
    """EP 32 of DeepSeek-V3 with 128 rows, worked out by hand from its formulas."""
    shape, by_name = replace(V3, rows=128), {way.name: way for ways in ascend.WAYS.values() for way in ways}
    sizes = {name: way.buffer_bytes(shape, 32, 8) for name, way in by_name.items()}
    assert sizes == {
        "hierarchy": (256 + 8) * (128 * (14336 + 128)) + 8 * 1024 * 1024,
        "fullmesh": 2 * (128 * 32 * 8 * 14336 + 2 * 1024 * 1024),
        "fullmesh_v1": 2 * (8 * 128 * 32 * 14848 + 9 * 128 * 14336),
        "fullmesh_v2": 2 * (8 * 128 * 32 * 15360 + 9 * 128 * 14336),
    }


def test_it_connects_to_a_communicator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu is asked for the card's name, and the backend for that of the group; the buffer is as large as need
    be."""
    made: list[Any] = []
    options = type("Options", (), {})
    hccl = SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=options))
    module = SimpleNamespace(
        npu=SimpleNamespace(get_device_name=lambda: "Ascend910_9391"),
        _C=SimpleNamespace(_distributed_c10d=hccl),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(
        threaded.ProcessLocalGroup, "_get_backend", lambda group, device: group, raising=False
    )
    name = lambda group, rank: f"{group.pg_name} of {group.size()}"  # noqa: E731
    monkeypatch.setattr(threaded.ProcessLocalGroup, "get_hccl_comm_name", name, raising=False)
    topology = Topology(1, 2)
    placement = default_placement(4, [0], topology)

    def program(comm: Any) -> tuple[str, bool]:
        plain = comm.new_group
        comm.new_group = lambda ranks, given: (made.append(given.hccl_config), plain(ranks))[1]
        exchange = ascend.connect(comm, placement, replace(V3, choices=2), "npu_distribute_int8")
        return exchange._group["group_ep"], exchange._int8

    (first, int8), (second, _) = CardWorld(topology).run(program)
    assert first == second and first.endswith(" of 2") and int8
    assert made == [{"hccl_buffer_size": 51}] * 2


def test_without_torch_npu_one_line_says_so() -> None:
    def program(comm: Any) -> None:
        ascend.connect(comm, default_placement(4, [0], comm.topology), V3, "npu_distribute")

    with pytest.raises(InputError, match=r"exchange npu_distribute needs torch_npu, .*; take two_tier"):
        CardWorld(Topology(1, 1)).run(program)
