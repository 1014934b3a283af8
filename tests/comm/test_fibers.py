"""Programs that take turns, and what they exchange meanwhile: no schedule hangs or changes a bit of the results."""

import random
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh import Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.fibers import Turns
from expertmesh.comm.group import Clustered, shares
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.traffic import algorithm
from tests.support.worlds import EVERY_WORLD, Worlds

WIDTH, EXPERTS, CHOICES = 24, 8, 3
SCHEDULES = 35
CLUSTERS = [(1, 2, 1), (2, 1, 1), (1, 2, 2), (3, 1, 1), (2, 2, 1), (2, 2, 2), (1, 4, 2)]


def expected_order(lengths: list[int]) -> list[tuple[int, int]]:
    """(program, step): one step each in a circle, without those that have ended."""
    return sorted(
        ((lane, step) for lane, length in enumerate(lengths) for step in range(length + 1)),
        key=lambda each: (each[1], each[0]),
    )


@given(st.lists(st.integers(0, 6), max_size=5))
def test_programs_take_turns_until_each_has_ended(lengths: list[int]) -> None:
    turns, log = Turns(), list[tuple[int, int]]()

    def program(lane: int) -> int:
        for step in range(lengths[lane] + 1):
            assert turns.lane == lane
            log.append((lane, step))
            if step < lengths[lane]:
                turns.turn()
        return lane * 10

    programs = [partial(program, lane) for lane in range(len(lengths))]
    for _ in range(2):
        log.clear()
        assert turns.run(programs) == [lane * 10 for lane in range(len(lengths))]
        assert log == expected_order(lengths) and turns.lane == 0
        turns.turn()  # outside: nothing


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
@given(st.integers(2, 4), st.integers(0, 3), st.integers(0, 4), st.integers(0, 6))
def test_where_one_raises_the_others_end(
    error: BaseException, count: int, which: int, when: int, length: int
) -> None:
    turns, which = Turns(), which % count
    begun, ended, finished = set[int](), set[int](), set[int]()

    def program(lane: int) -> None:
        begun.add(lane)
        try:
            for step in range(when + 1 if lane == which else length):
                if lane == which and step == when:
                    raise error
                turns.turn()
            finished.add(lane)
        finally:
            ended.add(lane)

    with pytest.raises(type(error)) as caught:
        turns.run([partial(program, lane) for lane in range(count)])
    assert caught.value is error
    assert begun == ended and which in begun
    # Those that were before it in the circle had a turn more.
    assert finished == {lane for lane in range(count) if lane != which and length <= when - (lane > which)}
    assert turns.run([lambda: 1, lambda: 2]) == [1, 2] and turns.lane == 0


def test_one_program_has_nobody_to_wait_for() -> None:
    turns = Turns()
    assert turns.run([turns.turn]) == [None] and turns.run([]) == []


class Schedule:
    """What the programs of every rank do, drawn at random; which of it is the same on all ranks has to be."""

    def __init__(self, topology: Topology, seed: int) -> None:
        rng = random.Random(seed)
        self.topology, self.seed, self.lanes = topology, seed, rng.choice([1, 2, 2, 2, 3])
        self.how = algorithm(rng.choice(["flat", "two_tier", "two_tier", "two_tier_int8_both"]))
        self.pieces = rng.choice([1, 1, 2, 3, 5])
        replicas = rng.choice([0, 4 * (topology.cards_per_node - 1)])
        self.placement = default_placement(EXPERTS, [0, 1], topology, replicas)
        # Layers of each lane; rows of each lane and TP group, of which a rank has its share.
        self.layers = [rng.randrange(4) for _ in range(self.lanes)]
        self.rows = [
            [rng.choice([0, 0, 1, 2, 5, 40]) for _ in range(topology.groups)] for _ in range(self.lanes)
        ]
        self.slow = rng.choice([0.0, 0.0, 0.0, 0.1])

    def programs(self, clustered: Clustered, hurry: bool) -> list[Callable[[], Tensor]]:
        return [partial(self._program, clustered, lane, hurry) for lane in range(self.lanes)]

    def _program(self, clustered: Clustered, lane: int, hurry: bool) -> Tensor:
        comm, topology = clustered.comm, self.topology
        own = random.Random(self.seed * 1000 + comm.rank * 10 + lane)
        rows = self.rows[lane][topology.group_of(comm.rank)]
        mine = shares(rows, topology.tp)[topology.tp_rank(comm.rank)]
        generator = torch.Generator().manual_seed(own.getrandbits(60))
        x = torch.randn(mine, WIDTH, generator=generator)
        group = clustered.group(rows)
        for layer in range(self.layers[lane]):
            if not hurry and random.random() < self.slow:
                time.sleep(random.random() / 200)
            (every,) = group.all_gather(x)
            x = group.reduce_scatter(every * (1 + topology.tp_rank(comm.rank)))
            order = np.random.default_rng(own.getrandbits(60)).permuted(
                np.tile(np.arange(EXPERTS), (mine, 1)), axis=1
            )
            experts = torch.from_numpy(order[:, :CHOICES])
            weights = torch.rand(mine, CHOICES, generator=generator)
            received = clustered.exchange.dispatch(layer % 2, x, experts, weights)
            factors = (received.slots_RK.clamp(min=0) + 1 + comm.rank).float() * received.weights_RK
            y = received.x_RD * factors.sum(1, keepdim=True)
            x = clustered.exchange.combine(y, received) / 8
        return group.gather_rows(x, range(rows))


def results(topology: Topology, world: Worlds, overlap: bool) -> list[list[list[Tensor]]]:
    """Hidden states of all rows after many schedules, one after the other: by rank, schedule and lane."""
    schedules = [Schedule(topology, seed) for seed in range(SCHEDULES)]

    def play(comm: Comm, schedule: Schedule) -> list[Tensor]:
        exchange = TieredExchange(comm, schedule.placement, schedule.how, schedule.pieces if overlap else 1)
        clustered = Clustered(comm, exchange)
        programs = schedule.programs(clustered, hurry=not overlap)
        return clustered.run(programs) if overlap else [program() for program in programs]

    return world(topology).run(lambda comm: [play(comm, schedule) for schedule in schedules])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_schedules_at_random_give_the_bits_of_one_program_after_the_other(
    cluster: tuple[int, int, int],
) -> None:
    """Programs of one rank are of different length, have rows or none, and ranks are slow at different times."""
    topology = Topology(*cluster)
    expected = results(topology, EVERY_WORLD[0], False)
    for world in EVERY_WORLD:
        found = results(topology, world, True)
        for rank, seed in product(range(topology.ranks), range(SCHEDULES)):
            same = map(torch.equal, expected[rank][seed], found[rank][seed])
            assert all(same), (world.__name__, rank, seed)


@pytest.mark.parametrize("world", EVERY_WORLD, ids=lambda world: world.__name__)
def test_a_program_that_raises_while_rows_travel_ends_its_rank(world: Worlds) -> None:
    """The other ranks are told, and what it raised is what is raised."""
    topology = Topology(2, 2, 1)
    placement = default_placement(EXPERTS, [0], topology)
    closed = []

    def program(comm: Comm) -> None:
        clustered = Clustered(comm, TieredExchange(comm, placement, algorithm("two_tier"), 2))

        def lane(number: int) -> None:
            try:
                for step in range(5):
                    x = torch.ones(4, WIDTH)
                    experts = torch.arange(4 * CHOICES).view(4, CHOICES) % EXPERTS
                    received = clustered.exchange.dispatch(0, x, experts, torch.ones(4, CHOICES))
                    if comm.rank == 3 and number == 1 and step == 2:
                        raise ValueError("broken")
                    clustered.exchange.combine(received.x_RD, received)
            finally:
                closed.append((comm.rank, number))

        clustered.run([partial(lane, 0), partial(lane, 1)])

    with pytest.raises(ValueError, match="broken"):
        world(topology).run(program)
    assert sorted(closed) == [(rank, lane) for rank in range(4) for lane in range(2)]
