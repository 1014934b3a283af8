"""Services: Little's law, what limits, together and apart."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import card
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.models import model
from expertmesh.planner.serving import Service, Workload, chunk, prefill_rate, prefill_time, serve

ONE = Deployment(model("deepseek-v3"), card("h200"), Topology(1, 8, 1))
MIXED, APART = Service(ONE, 2), Service(ONE, 1, ONE, 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([MIXED, APART]), st.floats(1, 4000), st.floats(100, 9000), st.floats(16, 4000))
def test_requests_are_where_they_can_be(service: Service, requests: float, isl: float, osl: float) -> None:
    """Those that are decoded and those in prefill are all there are (Little's law)."""
    work = Workload(isl, osl)
    found = serve(service, work, requests)
    assert found.tpot >= found.step.seconds * 0.999 and found.ttft > 0
    assert found.tokens == pytest.approx(found.batch * service.groups / found.tpot, rel=1e-6)
    present = found.batch * service.groups + found.tokens / work.output * found.ttft
    assert present == pytest.approx(requests, rel=0.05)
    assert found.prefill_use <= 1.001


def test_prefill_may_be_what_limits() -> None:
    """Long prompts and short answers: no more than prefill takes, however many ask."""
    work = Workload(8192, 128)
    few, many = serve(APART, work, 200), serve(APART, work, 4000)
    most = prefill_rate(ONE, work)
    assert many.prefill_use > 0.95 and many.tokens / work.output <= most * 1.001
    assert many.tokens < 1.2 * few.tokens and many.ttft > 5 * few.ttft


def test_decoding_waits_for_prefill_only_where_it_shares_ranks() -> None:
    """Together, each token brings its share of a prompt."""
    work = Workload(4096, 512)
    together, apart = serve(MIXED, work, 400), serve(APART, work, 200)
    assert apart.tpot == pytest.approx(apart.step.seconds)
    assert together.tpot > 1.05 * together.step.seconds
    assert serve(MIXED, Workload(64, 512), 400).tpot < together.tpot


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="there must be some"):
        serve(MIXED, Workload(10, 10), 0)
    with pytest.raises(InputError, match="at least 1 token"):
        Workload(10, 0)


def test_each_further_group_costs_prefill_a_little() -> None:
    """All wait for the fullest one; the first alone waits for nobody, and there is no cliff behind it."""
    work = Workload(4096, 1024)
    shares = []
    for tp in (8, 4, 2, 1):
        d = Deployment(model("deepseek-v3"), card("h200"), Topology(1, 8, tp))
        full = chunk(d) // work.input * d.topology.groups / prefill_time(d, work)
        shares.append(prefill_rate(d, work) / full)
    assert shares[0] == pytest.approx(1.0) and shares == sorted(shares, reverse=True)
    assert all(b > 0.8 * a for a, b in pairwise(shares))
