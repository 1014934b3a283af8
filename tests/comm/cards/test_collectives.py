"""What is chosen by an exchange's name, and a whole model over it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm import local
from expertmesh.comm.base import Comm
from expertmesh.comm.cards import ascend
from expertmesh.comm.cards.ascend import AscendExchange, Chip
from expertmesh.comm.cards.collectives import CardCollectives, card_collectives
from expertmesh.comm.cards.exchange import CardExchange
from expertmesh.comm.cards.native import StepShape
from expertmesh.comm.group import Clustered
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine import ranks
from expertmesh.errors import InputError
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.traffic import NATIVE, algorithm
from tests.comm.cards.ascend_ops import FusedOps
from tests.comm.cards.world import CPU, threaded_groups
from tests.support.files import TINY, random_checkpoint, write_tokenizer

SHAPE = StepShape(64, 3, 8, torch.bfloat16)


def layout_of(name: str) -> Layout:
    topology = Topology(1, 1, 1)
    return Layout(topology, default_placement(4, [0], topology), algorithm(name, native=True))


def chosen(name: str, store: dist.Store, device: torch.device = CPU) -> Any:
    return card_collectives(
        layout_of(name), 0, device, "gloo", store=store, timeout=10.0, shape=SHAPE
    )  # fmt: skip


@pytest.mark.parametrize("name", ["flat", "two_tier_int8"])
def test_our_own_exchanges_run_on_the_device(name: str, tmp_path: Path) -> None:
    collectives = chosen(name, dist.FileStore(str(tmp_path / "store"), 1))
    try:
        assert isinstance(collectives.exchange, CardExchange)
        assert collectives.exchange.how.name == name and collectives.comm.device == CPU
    finally:
        collectives.comm.close()


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_a_native_exchange_without_its_package_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"exchange {name} needs {NATIVE[name].native}"):
        chosen(name, dist.FileStore(str(tmp_path / "store"), 1))
    assert not dist.is_initialized()


def test_ascend_has_no_fp8() -> None:
    # A device of this kind has that name only where torch_npu is.
    device = type("Device", (), {"type": "npu"})()
    with pytest.raises(InputError, match="Ascend cards have no FP8; take two_tier_int8_both"):
        chosen("two_tier_fp8_both", dist.HashStore(), device)


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_native_exchanges_are_for_cards(name: str, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=f"exchange {name} is .*, between cards; here take two_tier"):
        LLM(tiny_folder, topology=Topology(1, 2, 1), exchange=name)
    with pytest.raises(InputError, match=f"exchange {name} shares rows out .* evenly; leave out split now"):
        LLM(tiny_folder, topology=Topology(1, 2, 1), exchange=name, split="now")
    layout = Layout.of(ModelConfig.from_folder(tiny_folder), Topology(1, 2, 1), name, 1)
    assert Layout.from_plain(layout.to_plain()).how == layout.how == NATIVE[name]


def test_rows_of_a_step_are_those_of_the_tp_group_shared_out(tiny_folder: Path) -> None:
    model, config = ModelConfig.from_folder(tiny_folder), EngineConfig(max_batch_tokens=100, dtype="bfloat16")
    shape = StepShape.of(model, config, Topology(2, 4, 4))
    assert shape == StepShape(48, 3, 25, torch.bfloat16)


@pytest.mark.parametrize(
    ("chip", "name", "topology"),
    [("A2", "hierarchy", Topology(2, 8, 2)), ("A2", "fullmesh", Topology(1, 8, 4))],
)
def test_a_model_over_fused_ops_gives_the_tokens_of_one_rank(
    chip: Chip, name: str, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come and go, so that groups have steps without rows, and replicas are chosen from. In float32, which no
    card takes here: in bfloat16 tokens differ as soon as sums are made in another order."""
    data = TINY | {"hidden_size": 64, "n_routed_experts": 32, "n_group": 8, "topk_group": 4}
    random_checkpoint(tmp_path, data)
    write_tokenizer(tmp_path)
    prompts = [[(7 * i + 11 * n) % 250 + 5 for i in range(3 + n)] for n in range(3)]
    params = [SamplingParams(max_tokens=2 + 3 * n, temperature=0.0, ignore_eos=True) for n in range(3)]
    options: dict[str, Any] = {"max_batch_tokens": 64, "page_size": 4}
    wanted = [o.token_ids for o in LLM(tmp_path, **options).generate(prompts, params)]

    def collectives_of(layout: Layout, comm: Comm) -> Clustered:
        (way,) = [way for way in ascend.WAYS[chip] if way.name == name]
        ops = FusedOps(comm, chip, "experts", [torch.float32])
        return Clustered(comm, AscendExchange(comm, layout.placement, way, ops, "experts"))

    monkeypatch.setattr(ranks, "collectives_of", collectives_of)
    llm = LLM(tmp_path, topology=topology, redundant=topology.ranks, **options)
    try:
        assert [o.token_ids for o in llm.generate(prompts, params)] == wanted
    finally:
        llm.close()


class OnFirstUse:
    """Card collectives that are made in their rank's own thread."""

    def __init__(self, layout: Layout, rank: int, store: dist.Store) -> None:
        self._arguments, self._store = (layout, rank, CPU, "threaded"), store
        self._made: CardCollectives | None = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = card_collectives(*self._arguments, store=self._store, timeout=60.0, shape=SHAPE)
        return getattr(self._made, name)


@pytest.mark.parametrize("split", ["even", "last"])
def test_a_model_over_card_collectives_gives_the_tokens_of_one_rank(
    split: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP groups, replicas, two micro-batches at once, and experts that move meanwhile."""
    prompts = [[(7 * i + 11 * n) % 250 + 5 for i in range(3 + n)] for n in range(4)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    wanted = [o.token_ids for o in LLM(tiny_folder, page_size=4).generate(prompts, params)]
    store = dist.HashStore()
    monkeypatch.setattr(ranks, "collectives_of", lambda layout, comm: OnFirstUse(layout, comm.rank, store))
    monkeypatch.setattr(
        local, "cores", lambda: 8
    )  # those who wait in torch's group have not gone out of turn
    options: dict[str, Any] = {"page_size": 4, "redundant": 4, "split": split, "overlap": "on"}
    with (
        threaded_groups(),
        LLM(tiny_folder, topology=Topology(2, 2, 2), rebalance="every=2", **options) as llm,
    ):
        assert [o.token_ids for o in llm.generate(prompts, params)] == wanted
