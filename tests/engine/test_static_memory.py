"""What a rank holds is what `weights.static_bytes` says, kind by kind: V3 without memory, the demo model in it."""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import LLM, ModelConfig, Topology
from expertmesh.config import EngineConfig
from expertmesh.config.precision import PRECISIONS
from expertmesh.engine.memory import new_weights
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels, kernels_for
from expertmesh.kernels.table import kernels_of
from expertmesh.kernels.triton.weights import PRECISIONS as PRECISIONS_OF_TRITON
from expertmesh.kernels.triton.weights import matrix
from expertmesh.mesh.layout import Layout
from expertmesh.model.deepseek import DeepSeek
from expertmesh.weights import Shard, expert_bytes, static_bytes
from tests.kernels.test_ops import NATIVE
from tests.support.files import TINY, official_config

V3 = ModelConfig.from_dict(official_config("deepseek-v3"))
# nodes, cards, attention TP, redundant slots
LAYOUTS = [
    (1, 1, 1, 0), (1, 8, 8, 0), (2, 8, 8, 0), (2, 8, 1, 16), (2, 16, 16, 0), (4, 8, 4, 32), (8, 8, 8, 0),
    (8, 8, 8, 64), (8, 8, 2, 64), (8, 8, 1, 0), (18, 4, 1, 32), (40, 8, 1, 64), (3, 5, 1, 0),
]  # fmt: skip
KEPT = [("float32", "none"), *(("bfloat16", kept) for kept in PRECISIONS)]


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Of what a module of the model has made."""
    *module, last = name.split(".")
    if last.endswith("norm"):
        return "norm"
    if name == "head" or module == ["embedding"]:
        return "embedding"
    if module[-1] == "mla":
        return "attention"
    if last in ("router", "bias"):
        return "router"
    if last.startswith("shared_"):
        return "shared"
    return "routed" if len(shape) == 3 else "dense"


def allocated(made: Mapping[Hashable, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (name, shape, _), memory in made.items():  # type: ignore[misc]
        counts[kind_of(name, shape)] += memory.nbytes
    return counts


def made_by(config: ModelConfig, shard: Shard, dtype: str, quantise: str, kernels: Kernels) -> Counter[str]:
    """What the modules of one rank allocate, on a device without memory."""
    made: dict[Hashable, Any] = {}
    engine = EngineConfig(quantise=quantise)
    DeepSeek(config, shard, kernels, new_weights(engine, dtype, "meta", kernels, made))
    return allocated(made)


@pytest.mark.parametrize(("nodes", "cards", "tp", "redundant"), LAYOUTS)
def test_v3_with_library_kernels(nodes: int, cards: int, tp: int, redundant: int) -> None:
    layout = Layout.of(V3, Topology(nodes, cards, tp), "two_tier", redundant)
    kernels = kernels_of(None)
    for dtype in ("float32", "bfloat16"):
        for rank in (0, layout.topology.ranks - 1):
            shard = Shard.of(rank, layout.topology, layout.placement)
            assert made_by(V3, shard, dtype, "none", kernels) == static_bytes(V3, dtype, shard)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize(("nodes", "cards", "tp", "redundant"), LAYOUTS)
@pytest.mark.parametrize("quantise", PRECISIONS)
def test_v3_with_kernels_of_our_own(nodes: int, cards: int, tp: int, redundant: int, quantise: str) -> None:
    layout = Layout.of(V3, Topology(nodes, cards, tp), "two_tier", redundant)
    kernels = kernels_for("cpu", "bfloat16", strict=True)
    for rank in (0, layout.topology.ranks - 1):
        shard = Shard.of(rank, layout.topology, layout.placement)
        formula = static_bytes(V3, "bfloat16", shard, quantise, packed=True)
        assert made_by(V3, shard, "bfloat16", quantise, kernels) == formula
        # All sizes of V3 divide, so that nothing is filled up.
        assert formula == static_bytes(V3, "bfloat16", shard, quantise)
        slots = sum(map(len, shard.slots.values()))
        assert formula["routed"] == slots * expert_bytes(V3, "bfloat16", quantise, packed=True)


@pytest.mark.parametrize(("nodes", "cards", "tp", "redundant"), [*LAYOUTS[1:6], (4, 8, 32, 0)])
@pytest.mark.parametrize("quantise", PRECISIONS_OF_TRITON)
def test_v3_as_kernels_in_triton_keep_it(
    nodes: int, cards: int, tp: int, redundant: int, quantise: str
) -> None:
    """Attention's prologue in bfloat16; in TP groups of 32 a rank's part of a dense layer begins inside of a block."""
    topology = Topology(nodes, cards if tp <= cards else tp, tp)
    layout = Layout.of(V3, topology, "two_tier", redundant)
    kernels = replace(kernels_of(None), matrix=matrix, precisions=PRECISIONS_OF_TRITON)
    shard = Shard.of(layout.topology.ranks - 1, layout.topology, layout.placement)
    formula = static_bytes(V3, "bfloat16", shard, kernels.precision(quantise))
    assert made_by(V3, shard, "bfloat16", quantise, kernels) == formula
    slots = sum(map(len, shard.slots.values()))
    assert formula["routed"] == slots * expert_bytes(V3, "bfloat16", kernels.precision(quantise))
    with pytest.raises(
        InputError, match=r"^quantise experts_int4 is not for the kernels .* none, w8a8, fp8$"
    ):
        made_by(V3, shard, "bfloat16", "experts_int4", kernels)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@settings(deadline=None, max_examples=60)
@given(data=st.data(), quantise=st.sampled_from([kept for kept in PRECISIONS if kept != "fp8"]))
def test_sizes_that_do_not_divide_are_filled_up(data: st.DataObject, quantise: str) -> None:
    """Fused down-projections, heads apart from each other, latents turned over: whatever the sizes."""
    sizes = {
        name: data.draw(st.integers(1, 70), name)
        for name in ("hidden_size", "moe_intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    }
    changes = {
        "q_lora_rank": data.draw(st.none() | st.integers(1, 40), "q_lora_rank"),
        "intermediate_size": 4 * data.draw(st.integers(1, 20), "intermediate_size / 4"),
        "attention_bias": data.draw(st.booleans(), "attention_bias"),
        "tie_word_embeddings": data.draw(st.booleans(), "tie_word_embeddings"),
        "n_shared_experts": data.draw(st.integers(0, 2), "n_shared_experts"),
    }
    config = ModelConfig.from_dict(TINY | sizes | changes)
    tp = data.draw(st.sampled_from([1, 2, 4]), "attention TP")
    layout = Layout.of(config, Topology(2, 4, tp), "two_tier", 3)
    shard = Shard.of(5, layout.topology, layout.placement)
    kernels = kernels_for("cpu", "bfloat16", strict=True)
    formula = static_bytes(config, "bfloat16", shard, quantise, packed=True)
    assert made_by(config, shard, "bfloat16", quantise, kernels) == formula


def test_routed_experts_of_64_cards_are_a_quarter_of_those_of_16() -> None:
    kinds = []
    for nodes in (2, 8):
        layout = Layout.of(V3, Topology(nodes, 8, 8), "two_tier", 0)
        kinds.append(static_bytes(V3, "bfloat16", Shard.of(0, layout.topology, layout.placement)))
    assert kinds[0]["routed"] == 4 * kinds[1]["routed"]
    assert 0.33 < sum(kinds[1].values()) / sum(kinds[0].values()) < 0.34


@pytest.fixture
def made_by_engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[Hashable, Any]]:
    """What every rank of the engines that are started makes, none of it shared with others."""
    found: list[dict[Hashable, Any]] = []

    def start(config: ModelConfig, shard: Shard, kernels: Kernels, new: Any) -> DeepSeek:
        if new._kept.device.type == "cpu":
            new._shared = {}
            found.append(new._shared)
        return DeepSeek(config, shard, kernels, new)

    monkeypatch.setattr("expertmesh.engine.ranks.DeepSeek", start)
    return found


@pytest.mark.parametrize(("dtype", "quantise"), [*KEPT[:3], ("bfloat16", "experts_int4")])
@pytest.mark.parametrize(
    ("nodes", "cards", "tp", "redundant"), [(1, 1, 1, 0), (2, 4, 2, 0), (2, 8, 8, 0), (2, 8, 4, 32)]
)
def test_every_rank_of_a_loaded_engine(
    nodes: int,
    cards: int,
    tp: int,
    redundant: int,
    dtype: str,
    quantise: str,
    made_by_engines: list[dict[Hashable, Any]],
) -> None:
    if quantise != "none" and not NATIVE:
        pytest.skip("no C++ compiler")
    options: dict[str, Any] = {"dtype": dtype, "quantise": quantise, "redundant": redundant}
    with LLM(topology=Topology(nodes, cards, tp), cache_tokens=64, **options) as llm:
        ranks, layout = llm.engine.ranks, llm.engine.layout
        assert isinstance(ranks, ThreadRanks)
        assert len(made_by_engines) == layout.topology.ranks == len(ranks.runners)
        for rank, made in enumerate(made_by_engines):
            shard = Shard.of(rank, layout.topology, layout.placement)
            packed = ranks.runners[rank].model.kernels.graph is not None
            formula = static_bytes(llm.engine.model, dtype, shard, quantise, packed=packed)
            assert allocated(made) == formula == ranks.memory.kinds
        for runner in ranks.runners:
            assert sum(layer.nbytes for layer in runner.cache) == ranks.memory.cache
