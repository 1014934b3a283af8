"""With rows on cards everything is as it is with rows in memory: what arrives, the bits of sums, and the bytes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh import Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.cards.exchange import CardExchange
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.fibers import Turns
from expertmesh.comm.local import LocalWorld
from expertmesh.comm.tiers import Tiers
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.traffic import ALGORITHMS, algorithm, traffic
from tests.comm.cards.world import CardWorld, experts_of
from tests.support.cluster import Case, cases

PIECES = st.sampled_from([1, 1, 2, 3, 9])


def run(
    world: Any, kind: Any, case: Case, name: str, pieces: int, split: str, dtype: torch.dtype
) -> list[Any]:
    """Of every rank in two steps: rows, slots and weights that came, what came back; and the bytes it sent."""

    def program(comm: Comm) -> tuple[list[tuple[Tensor, ...]], dict[str, Any]]:
        exchange: Tiers[Any] = kind(comm, case.placement, algorithm(name))
        exchange.prepare(pieces, split, max(map(len, case.x)) * case.experts[0].shape[1])
        steps = []
        for _ in range(2):
            x = case.x[comm.rank].to(dtype)
            received = exchange.dispatch(0, x, case.experts[comm.rank], case.weights[comm.rank])
            y = experts_of(received, comm.rank * case.placement.slots_per_rank)
            steps.append(
                (received.x_RD, received.slots_RK, received.weights_RK, exchange.combine(y, received))
            )
        return steps, comm.sent.bytes

    return list(world(case.topology).run(program))


@settings(max_examples=50)
@given(
    cases(),
    st.sampled_from(sorted(ALGORITHMS)),
    PIECES,
    st.sampled_from(["even", "even", "now", "last"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bits_are_those_of_rows_in_memory(
    case: Case, name: str, pieces: int, split: str, dtype: torch.dtype
) -> None:
    cards = run(CardWorld, CardExchange, case, name, pieces, split, dtype)
    memory = run(lambda t: LocalWorld(t, 60), TieredExchange, case, name, pieces, split, dtype)
    for (steps, sent), (wanted, sent_wanted) in zip(cards, memory, strict=True):
        for found, expected in zip(steps, wanted, strict=True):
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for purpose in ("dispatch", "combine"):
            np.testing.assert_array_equal(sent[purpose], sent_wanted[purpose])


@settings(max_examples=30)
@given(cases(), st.sampled_from(sorted(ALGORITHMS)), PIECES)
def test_bytes_are_those_of_the_law(case: Case, name: str, pieces: int) -> None:
    """What each collective carries, whatever is counted: rows and particulars, and 8 bytes of counts for each."""
    size, width, ranks = case.placement.slots_per_rank, case.x[0].shape[1], case.ranks
    carried = np.zeros((2, len(ranks), len(ranks)), dtype=np.int64)

    def program(comm: Any) -> None:
        rank, phase, scatter = comm.rank, 0, comm.scatter

        def watched(what: str, to: Any, rows: Tensor, sent: Any, coming: Any) -> Any:
            if what != "counts":
                others = np.array(to) != rank
                lengths = np.array(sent) * rows[:1].nbytes if len(rows) else np.zeros(len(to), dtype=np.int64)
                carried[phase, rank, np.array(to)[others]] += lengths[others]
            return scatter(what, to, rows, sent, coming)

        comm.scatter = watched
        exchange = CardExchange(comm, case.placement, algorithm(name), pieces)
        received = exchange.dispatch(0, case.x[rank], case.experts[rank], case.weights[rank])
        phase = 1
        exchange.combine(received.x_RD, received)

    CardWorld(case.topology).run(program)
    law = traffic(case.slots, case.topology, size, width, "float32", algorithm(name), pieces)
    talks = np.zeros_like(law.dispatch_RR)
    for hop in algorithm(name).hops:
        for rank in ranks:
            talks[rank, list(hop.peers(case.topology, rank))] += 8 * pieces
    np.fill_diagonal(talks, 0)
    np.testing.assert_array_equal(carried[0] + talks, law.dispatch_RR)
    np.testing.assert_array_equal(carried[1], law.combine_RR)


class Waits(TorchDispatchMode):
    """What ops a host would have to wait for: their results, or the shapes of these, depend on what is in tensors."""

    OPS = ("nonzero", "unique", "bincount", "masked_select", "repeat_interleave", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in args[1] if t.dtype == torch.bool] if name in ("index", "index_put_") else []
        if masks or any(op in name for op in self.OPS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_in_a_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, offsets and rows stay on the card: of all tensors only counts are read, together."""
    read: list[str] = []

    def watched(name: str) -> Any:
        plain = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any) -> Any:
            read.append(name)
            return plain(tensor, *args)

        return method

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, watched(name))

    def program(comm: Any) -> list[str]:
        exchange = CardExchange(
            comm, default_placement(8, [0], comm.topology), algorithm("two_tier_int8_both"), 3
        )
        x, experts = torch.ones(5, 16), (torch.arange(5)[:, None] + torch.arange(3)) % 8
        read.clear()
        with Waits() as waits:
            received = exchange.dispatch(0, x, experts, torch.ones(5, 3))
            exchange.combine(received.x_RD, received)
        return waits.found

    assert CardWorld(Topology(1, 1)).run(program) == [[]]
    assert read == ["cpu", "numpy"]


@pytest.mark.parametrize("name", ["flat", "two_tier"])
def test_micro_batches_take_turns_where_they_do_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology(2, 2, 1)
    placement = default_placement(8, [0, 1], topology)

    def of(world: Any, kind: Any) -> list[Any]:
        def program(comm: Comm) -> tuple[list[Tensor], list[int]]:
            exchange: Tiers[Any] = kind(comm, placement, algorithm(name), 2)
            order: list[int] = []

            def micro_batch(number: int) -> Tensor:
                generator = torch.Generator().manual_seed(10 * comm.rank + number)
                x = torch.randn(3 + comm.rank, 16, generator=generator)
                for layer in (0, 1):
                    experts = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in x])
                    received = exchange.dispatch(layer, x, experts, torch.ones(len(x), 3))
                    order.append(number)
                    x = exchange.combine(experts_of(received, comm.rank * 2), received)
                    order.append(number)
                return x

            programs = [lambda: micro_batch(0), lambda: micro_batch(1)]
            assert isinstance(comm.turns, Turns)
            return comm.turns.run(programs), order

        return list(world(topology).run(program))

    cards, memory = of(CardWorld, CardExchange), of(lambda t: LocalWorld(t, 60), TieredExchange)
    for (found, order), (wanted, wanted_order) in zip(cards, memory, strict=True):
        assert order == wanted_order and {0, 1} == set(order[:2])
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_experts_that_have_moved_get_the_rows() -> None:
    topology = Topology(1, 2, 1)
    old = default_placement(4, [0], topology)
    new = old.replaced({0: old.slots_LRS[0][::-1].copy()})

    def program(comm: Any) -> list[list[int]]:
        exchange = CardExchange(comm, old, algorithm("flat"))
        came = []
        for placement in (old, new):
            exchange.put(placement)
            received = exchange.dispatch(0, torch.ones(1, 8), torch.tensor([[0]]), torch.ones(1, 1))
            came.append(received.slots_RK.flatten().tolist())
        return came

    first, second = CardWorld(topology).run(program)
    assert first == [[0, 0], []] and second == [[], [0, 0]]
