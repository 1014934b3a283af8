"""The engine with the kernels of cards: on a card without memory, and with tensors on the processor."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm.cards.native import StepShape
from expertmesh.comm.fibers import Turns
from expertmesh.comm.streams import Streams
from expertmesh.device import Device
from expertmesh.engine import engine as engine_module
from expertmesh.engine import processes, worker
from expertmesh.engine import runner as runner_module
from expertmesh.engine.processes import ProcessRanks
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.kernels.capture import CardGraph
from expertmesh.kernels.table import reference_kernels
from expertmesh.mesh.layout import Layout
from tests.engine.card_ranks import Card
from tests.support.cards import GB, Library

PROMPTS = [[5, 60, 7, 19, 200], [9], list(range(30, 70))]
PARAMS = [SamplingParams(max_tokens=5 + 4 * i, temperature=0, ignore_eos=True) for i in range(len(PROMPTS))]


def test_a_step_crosses_from_the_host_and_back_once_each() -> None:
    """The whole model, of V3's shapes: all else of a step stays on the card, and no op reads it from the host."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.card_step"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    # The numbers of the step, and which rows are asked for.
    assert found["crossings"] == {"to to npu": 2}
    assert found["answers"] == [[5, "npu"]] and len(found["sampled"]) == 5
    assert found["loads"] == {"1": [256, "npu"]}


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What the demo model says in float32 on a processor."""
    with LLM(dtype="float32", device="cpu", prefix_cache=False) as llm:
        return tokens_of(llm)


def pretend(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """There is a card of this kind, whose tensors lie on the processor, and nobody has made kernels for it."""
    monkeypatch.setattr(engine_module, "find", lambda name: Device(kind))
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize("topology", [Topology(), Topology(2, 2, 2)], ids=str)
def test_kernels_of_ascend_with_tensors_on_the_processor(
    topology: Topology, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "npu")
    monkeypatch.setattr(engine_module, "kernels_for", lambda *_: reference_kernels())
    with LLM(dtype="float32", topology=topology, prefix_cache=False) as llm:
        assert llm.engine.config.device == "npu" and llm.engine.config.ranks == "threads"
        assert tokens_of(llm) == expected


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """Of a card whose steps are captured."""
    pretend(monkeypatch, "cuda")
    library = Library()
    monkeypatch.setattr(runner_module, "_graph_of", lambda kernels, device: CardGraph(library))
    yield library


def demo(**options: Any) -> LLM:
    return LLM(dtype="float32", prefix_cache=False, max_context=96, cache_tokens=512, **options)


def test_steps_are_captured_once_and_give_the_same_tokens(
    library: Library, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sizes that are rounded up: rows that do nothing change neither tokens nor loads, and write to no page that is
    anybody's."""
    monkeypatch.setattr(CardGraph, "size", lambda graph, rows: 2 if rows <= 2 else 5)
    with demo(max_batch_requests=4) as llm:
        assert isinstance(llm.engine.ranks, ThreadRanks)
        (runner,) = llm.engine.ranks.runners
        assert tokens_of(llm) == expected
        assert len(library.captured) == 2  # of two rows, and of four, of which there are at most
        loads = llm.engine.ranks.loads()
        assert tokens_of(llm) == expected and len(library.captured) == 2
        assert all(torch.equal(2 * loads[layer], rows) for layer, rows in llm.engine.ranks.loads().items())
        runner.replay = None
        llm.engine.ranks.reset()
        assert tokens_of(llm) == expected
        assert all(torch.equal(loads[layer], rows) for layer, rows in llm.engine.ranks.loads().items())


def test_where_capture_fails_steps_are_computed_one_op_after_the_other(
    library: Library, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    library.broken = "CUDA error: out of memory"
    with demo() as llm:
        assert tokens_of(llm) == expected
    said = [record.getMessage() for record in caplog.records if "recorded" in record.getMessage()]
    assert said == ["steps are not recorded, and take longer to start: CUDA error: out of memory"]
    assert len(library.captured) == 1


def test_ranks_that_have_cards_are_processes_that_meet_at_a_store(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which say what their cards have free, of which the least settles the cache of all, and get theirs by their
    place on the machine."""
    asked = []
    monkeypatch.setattr(processes, "find", lambda kind, index: asked.append((kind, index)))
    monkeypatch.setattr(processes, "PROGRAM", "tests.engine.card_ranks:serve_rank")
    monkeypatch.setattr(engine_module, "find", lambda name: Card("cuda"))
    monkeypatch.setitem(sys.modules, "triton", None)
    options: dict[str, Any] = {"exchange": "flat", "overlap": "off", "prefix_cache": False}
    with LLM(dtype="float32", topology=Topology(1, 2, 1), max_batch_requests=1 << 20, max_batch_tokens=1 << 20,
             **options) as llm:  # fmt: skip
        ranks, config = llm.engine.ranks, llm.engine.config
        assert isinstance(ranks, ProcessRanks) and config.ranks == "processes" and asked == [("cuda", 1)]
        assert [place["room"]["free"] for place in ranks.places] == [6 * GB, 5 * GB]
        assert tokens_of(llm) == expected
        assert sum(sum(sent.bytes["dispatch"]) for sent in ranks.sent()) > 0
        per_token = ranks.memory.cache // (config.cache_tokens or 1)
        left = 5 * GB - ranks.memory.weights - GB
        assert left - 32 * per_token < ranks.memory.cache < left + 32 * per_token
        assert all(int(rows.sum()) > 0 for rows in ranks.loads().values())


def test_what_collectives_of_cards_are_made_of(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    """The one call to those, on a stand-in."""
    given: dict[str, Any] = {}

    def card_collectives(layout: Layout, rank: int, where: torch.device, backend: str, **others: Any) -> str:
        given.update(others, layout=layout, rank=rank, where=where, backend=backend)
        return "collectives"

    monkeypatch.setattr(worker, "card_collectives", card_collectives)
    monkeypatch.setattr(torch, "cuda", library := Library())
    shape = StepShape(64, 2, 8, torch.bfloat16)
    with LLM(tiny_folder, topology=Topology(1, 2), device="cpu") as llm:
        ranks = llm.engine.ranks
        assert isinstance(ranks, ThreadRanks)
        layout, comm = llm.engine.layout, ranks._comms[1]
        device = Device("cuda", 1, torch.device("cuda", 1))
        made: Any = worker.cards_collectives(layout, comm, device, "store", 40.0, shape)
    assert made == "collectives" and given.pop("layout") is layout and given.pop("sent") is comm.sent
    turns = given.pop("turns")
    assert isinstance(turns, Turns) and isinstance(turns._lanes, Streams) and turns._lanes._library is library
    where = torch.device("cuda", 1)
    assert given == {
        "rank": 1, "where": where, "backend": "nccl", "store": "store", "timeout": 40.0, "shape": shape
    }  # fmt: skip
