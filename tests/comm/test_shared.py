"""Memory that a node shares: a part stays as it is while anybody reads it, and is used again afterwards."""

import gc
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from expertmesh.comm import shared
from expertmesh.comm.base import CommError
from expertmesh.comm.shared import ALIGNMENT, Free, NodeMemory

TABLE = 4096  # bytes at the beginning of a pool
ROOM = 32  # blocks of the smallest size behind it


class Allocator(RuleBasedStateMachine):
    """`Free` against a list that says of every byte whether it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.free = Free(10, 60)
        self.bytes = [True] * 10 + [False] * 50
        self.taken: list[tuple[int, int]] = []

    @rule(size=st.integers(1, 20))
    def take(self, size: int) -> None:
        fits = [at for at in range(61 - size) if not any(self.bytes[at : at + size])]
        start = self.free.take(size)
        assert start == min(fits, default=None)
        if start is not None:
            self.bytes[start : start + size] = [True] * size
            self.taken.append((start, size))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        start, size = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.free.give(start, size)
        self.bytes[start : start + size] = [False] * size

    @invariant()
    def ranges_are_whole(self) -> None:
        ranges = self.free._ranges
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
        assert sum(end - start for start, end in ranges) == self.bytes.count(False)


TestAllocator = Allocator.TestCase


def memories(count: int, blocks: int = ROOM) -> list[NodeMemory]:
    """A node's, over sockets that are closed afterwards: the memory stays."""
    with ExitStack() as stack, patch.object(shared, "POOL", TABLE + blocks * ALIGNMENT):
        peers: list[dict[int, socket.socket]] = [{} for _ in range(count)]
        for a in range(count):
            for b in range(a):
                pair = socket.socketpair()
                peers[a][b], peers[b][a] = map(stack.enter_context, pair)
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda rank: NodeMemory(rank, peers[rank], 60), range(count)))


class Node(RuleBasedStateMachine):
    """Three ranks that make parts, lend them, read them and let go of them as they like.

    A message that says where a part lies is on its way until it is read; those of one rank to another stay in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.node = memories(3)
        self.held: list[tuple[int, Tensor, Tensor]] = []  # by rank: a part, and what it has to be
        self.on_the_way: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        self.random = random.Random(0)

    def fill(self, part: Tensor) -> Tensor:
        part.copy_(
            torch.randint(
                256, part.shape, generator=torch.Generator().manual_seed(self.random.getrandbits(60))
            )
        )
        return part.clone()

    @rule(rank=st.integers(0, 2), size=st.integers(1, 6 * ALIGNMENT))
    def make(self, rank: int, size: int) -> None:
        part = self.node[rank].new(size)
        if part is not None:
            assert part.numel() == size
            self.held.append((rank, part, self.fill(part)))

    @rule(rank=st.integers(0, 2), size=st.integers(1, 6 * ALIGNMENT))
    def find(self, rank: int, size: int) -> None:
        """A part from elsewhere."""
        part = torch.empty(size, dtype=torch.uint8)
        self.held.append((rank, part, self.fill(part)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), both=st.booleans())
    def lend(self, data: st.DataObject, both: bool) -> None:
        """Also what was lent before, what came from another rank, and a part of a part."""
        # By number: what is drawn itself, hypothesis holds for longer.
        rank, part, expected = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        first = data.draw(st.sampled_from([0, 0, min(ALIGNMENT, part.numel() - 1)]))
        readers = [(rank + 1) % 3, (rank + 2) % 3][: 1 + both]
        start = self.node[rank].lend(part[first:], readers)
        if start is not None:
            for reader in readers:
                self.on_the_way.setdefault((rank, reader), []).append((start, expected[first:]))

    @precondition(lambda self: any(self.on_the_way.values()))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        pairs = sorted(pair for pair, waiting in self.on_the_way.items() if waiting)
        lender, reader = data.draw(st.sampled_from(pairs))
        start, expected = self.on_the_way[lender, reader].pop(0)
        part = self.node[reader].view(lender, start, expected.numel())
        self.held.append((reader, part, expected))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @rule(rank=st.integers(0, 2))
    def publish(self, rank: int) -> None:
        self.node[rank].publish()

    @invariant()
    def nothing_changes_while_it_is_held(self) -> None:
        for _, part, expected in self.held:
            assert torch.equal(part, expected)

    def teardown(self) -> None:
        """When nobody holds anything any more, all of it is free."""
        for (lender, reader), waiting in self.on_the_way.items():
            for start, expected in waiting:
                assert torch.equal(self.node[reader].view(lender, start, expected.numel()), expected)
        self.held.clear()
        for memory in self.node:
            memory.publish()
        for memory in self.node:
            assert memory.new(ROOM * ALIGNMENT) is not None


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_a_part_is_read_where_it_lies() -> None:
    lender, reader = memories(2)
    part = lender.new(100)
    assert part is not None
    start = lender.lend(part, [1])
    assert start is not None
    view = reader.view(0, start, 100)
    part.fill_(7)
    assert view.tolist() == [7] * 100


def test_a_view_of_a_view_keeps_the_part() -> None:
    """Whatever was made of a part without a copy: rows as numpy arrays, other types, slices."""
    lender, reader = memories(2, blocks=4)
    part = lender.new(4 * ALIGNMENT)
    assert part is not None
    start = lender.lend(part.fill_(1), [1])
    assert start is not None
    del part
    rows = torch.from_numpy(reader.view(0, start, 4 * ALIGNMENT).numpy()[8:].reshape(-1, 8)[1:])
    last = rows.view(torch.int16).flatten()[-1:]
    for kept in (rows, last):
        gc.collect()
        reader.publish()
        assert lender.new(1) is None and kept.any()
    del rows, last, kept
    reader.publish()
    assert lender.new(4 * ALIGNMENT) is not None


def test_a_full_pool_takes_nothing_more() -> None:
    lender, reader = memories(2, blocks=4)
    first = lender.lend(torch.zeros(3 * ALIGNMENT, dtype=torch.uint8), [1])
    assert first == TABLE
    assert lender.new(2 * ALIGNMENT) is None
    assert lender.lend(torch.zeros(ALIGNMENT + 1, dtype=torch.uint8), [1]) is None
    # What did not fit was not counted either: the reader's numbers are the lender's.
    assert lender.lend(torch.ones(ALIGNMENT, dtype=torch.uint8), [1]) == TABLE + 3 * ALIGNMENT
    views = [reader.view(0, TABLE, 3 * ALIGNMENT), reader.view(0, TABLE + 3 * ALIGNMENT, ALIGNMENT)]
    del views[1]
    reader.publish()
    assert lender.new(1) is None  # in order: the first one is still read
    views.clear()
    reader.publish()
    assert lender.new(4 * ALIGNMENT) is not None


@pytest.mark.parametrize("gone", [False, True])
def test_a_rank_that_shares_nothing_is_named(gone: bool) -> None:
    near, far = socket.socketpair()
    with near, far:
        if gone:
            far.close()
        with pytest.raises(CommError, match=r"rank 3 of this node shares no memory: (timed out|Broken pipe)"):
            NodeMemory(2, {3: near}, 0.1)
