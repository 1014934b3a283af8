"""The fused prologue and expert layer against their operations one by one."""

import pytest

from tests.kernels.triton import expert_costs
from tests.kernels.triton.conftest import Found, needed
from tests.kernels.triton.costs import CARDS, compiled, seconds, unfused


def test_fusing_takes_fewer_launches_bytes_and_time_for_the_same_products() -> None:
    needed("bishengir")
    apart, together = unfused(128), compiled(128, "Ascend910B1")
    assert len(together) == 2 < len(apart)
    assert sum(x.bytes for x in together) < sum(x.bytes for x in apart)
    # The products that take rotary parts out of tiles come on top.
    ratio = sum(x.flops for x in together) / sum(x.flops for x in apart)
    assert 1 <= ratio < 1.02
    # Memory is read once at least: what programs load is no less than what there is, but for masked heads' values.
    assert all(x.loaded > 0.9 * x.bytes for x in together)
    assert seconds(together, "ascend-910b") < 0.6 * seconds(apart, "ascend-910b")


@pytest.mark.parametrize("rows", [1, 8, 128, 1024])
def test_a_fused_expert_layer_takes_fewer_launches_bytes_and_time_for_the_same_products(rows: int) -> None:
    apart, together = expert_costs.unfused(rows), list(expert_costs.fused(rows))
    assert len(together) == 9 and len(apart) == 29
    assert sum(x.flops for x in together) == sum(x.flops for x in apart)
    assert sum(x.bytes for x in together) < sum(x.bytes for x in apart)
    assert all(seconds(together, card) < seconds(apart, card) for card in CARDS)
    # Nine experts' weights are read by both, each once.
    weights = 9 * 3 * 7168 * 2048 * 2
    assert all(weights < sum(x.bytes for x in launches) for launches in (apart, together))


def test_launches_are_those_that_ops_make(found: Found) -> None:
    made = {line["example"]: line["names"] for line in found("fusing")}
    assert made["prologue"] == ["mla_down", "mla_up"]
    assert made["expert_layer"] == [launch.name.split()[0] for launch in expert_costs.fused(1)]
