"""Memory of a rank: the loader's own formula, and the announced layouts."""

from dataclasses import replace

import pytest

from expertmesh.config import cache_bytes_per_token
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import card
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.formats import WEIGHTS
from expertmesh.planner.memory import cache_bytes, most_requests, room, static_memory, workspace_bytes
from expertmesh.planner.models import model
from expertmesh.weights import Shard, count_parameters, describe, static_bytes

V3, A2 = model("deepseek-v3"), card("ascend-910b")
ENGINE = [w for w in WEIGHTS.values() if w.engine]


@pytest.mark.parametrize("precision", ENGINE, ids=lambda w: w.name)
@pytest.mark.parametrize(
    ("topology", "redundant"), [(Topology(2, 8, 8), 0), (Topology(8, 8, 8), 64), (Topology(8, 8, 1), 3)]
)
def test_it_is_what_the_engine_holds(precision: object, topology: Topology, redundant: int) -> None:
    name = next(w for w in ENGINE if w == precision)
    layout = Layout.of(V3, topology, "two_tier", redundant)
    shard = Shard.of(0, layout.topology, layout.placement)
    planned = static_memory(Deployment(V3, A2, topology, redundant=redundant, weight_precision=name.name))
    assert planned == static_bytes(V3, "bfloat16", shard, name.engine or "")


def test_the_announced_layouts() -> None:
    """Routed experts of 64 cards are a quarter of those of 16, exactly; a token of cache takes 70,272 bytes."""
    small, large = (Deployment(V3, A2, Topology(n, 8, 8), weight_precision="int8") for n in (2, 8))
    assert static_memory(large)["routed"] * 4 == static_memory(small)["routed"]
    assert sum(static_memory(small).values()) / 1e9 == pytest.approx(46.27, rel=0.02)
    assert cache_bytes(small) == cache_bytes_per_token(V3, "bfloat16") == 70_272
    assert room(large) > 2 * room(small) and most_requests(large, 4096) > 2 * most_requests(small, 4096)


def test_drafts_take_an_mtp_layer() -> None:
    """Whole on one rank: all that the checkpoint has of it, but for the copies of embedding and head."""
    one = Deployment(V3, A2, Topology(1, 1, 1), weight_precision="bf16")
    extra = static_memory(replace(one, drafts=1))["mtp"]
    mtp = [w for w in describe(V3) if (w.layer or 0) >= 61 and not w.name.endswith("_scale_inv")]
    numbers = sum(count_parameters(mtp).values()) - 2 * V3.vocab_size * V3.hidden_size
    routers = sum(w.numel for w in mtp if w.kind == "router")
    assert extra == 2 * numbers + 2 * routers
    assert "mtp" not in static_memory(one)
    assert cache_bytes(replace(one, drafts=2)) == cache_bytes(one) * 62 / 61


def test_four_bits() -> None:
    """An NVFP4 checkpoint's routed experts: half a byte, and one of scale for 16 numbers."""
    routed = static_memory(Deployment(V3, A2, Topology(1, 1, 1), weight_precision="nvfp4"))["routed"]
    assert routed == 58 * 256 * 3 * 7168 * 2048 * 9 / 16


def test_no_room() -> None:
    assert most_requests(Deployment(V3, A2, Topology(1, 8, 1)), 4096) == 0


@pytest.mark.parametrize("tp", [1, 8])
def test_rows_of_prefill_take_memory_from_requests(tp: int) -> None:
    """As much as their workspace; those of decoding, which never come in the same step, are in it."""
    d = Deployment(V3, A2, Topology(8, 8, tp), weight_precision="int8")
    alone, beside = most_requests(d, 4096), most_requests(d, 4096, 8192)
    used = beside * 4096 * cache_bytes(d) + workspace_bytes(d, 8192)
    assert 0 < beside < alone and used <= room(d, 0) < used + 4096 * cache_bytes(d)
    assert most_requests(d, 4096, 1.0) == alone
