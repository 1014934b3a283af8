"""Memory that the processes of a node share: a rank puts a part into a pool of its own, and others read it in place.

A pool is anonymous memory that is handed over as a descriptor: it goes when its last process does, however that ends.
"""

import mmap
import os
import socket
import time
import weakref
from bisect import bisect
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertmesh.comm.base import CommError

POOL = 1 << 30  # bytes of address space: only pages that were once written take memory
ALIGNMENT = 64
_Key: TypeAlias = tuple[int, int]  # owner of the pool, and number of the part or where it begins


@dataclass
class _Block:
    """A range of the pool; users: readers that have not let go of it, and this rank itself while it holds it."""

    start: int
    size: int
    users: int


class Free:
    """Free ranges of a pool. The lowest that fits is taken, so that the same few pages are used again."""

    def __init__(self, start: int, end: int) -> None:
        self._ranges = [(start, end)]

    def take(self, size: int) -> int | None:
        """Where `size` bytes are free, None where they are not."""
        for number, (start, end) in enumerate(self._ranges):
            if end - start >= size:
                if end - start == size:
                    del self._ranges[number]
                else:
                    self._ranges[number] = (start + size, end)
                return start
        return None

    def give(self, start: int, size: int) -> None:
        end, place = start + size, bisect(self._ranges, (start, start))
        if place < len(self._ranges) and self._ranges[place][0] == end:
            end = self._ranges.pop(place)[1]
        if place and self._ranges[place - 1][1] == start:
            place -= 1
            start = self._ranges.pop(place)[0]
        self._ranges.insert(place, (start, end))


class NodeMemory:
    """One rank's pool and its view of those of the other ranks of its node.

    At the beginning of a pool is a table: for each rank of the node, how many of its parts the pool's owner has read
    and let go of. So a sender learns without a message which blocks of its own pool are free again.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], timeout: float) -> None:
        """peers: the other ranks of the node; each calls this at the same time. CommError names one that does not
        within `timeout` seconds."""
        self.rank = rank
        ranks = sorted([rank, *peers])
        self._place = {each: place for place, each in enumerate(ranks)}
        table = -(-len(ranks) * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("expertmesh")
        os.ftruncate(descriptor, POOL)
        maps = {rank: mmap.mmap(descriptor, POOL)}
        try:
            maps |= _trade(descriptor, peers, time.monotonic() + timeout)
        finally:
            os.close(descriptor)
        self._maps = {each: np.frombuffer(memory, dtype=np.uint8) for each, memory in maps.items()}
        self._read = {each: memoryview(memory)[: 8 * len(ranks)].cast("Q") for each, memory in maps.items()}
        self._base = torch.from_numpy(self._maps[rank]).data_ptr()
        self._free = Free(table, POOL)
        self._blocks: dict[int, _Block] = {}
        self._lent: dict[int, deque[_Block]] = {peer: deque() for peer in peers}
        self._given_back: Counter[int] = Counter()  # blocks that each peer has let go of
        # Parts that this rank holds, of any pool: references that call back when nobody does any more.
        self._held: dict[_Key, weakref.ref[NDArray[np.uint8]]] = {}
        self._let_go: deque[_Key] = deque()
        self._count: Counter[int] = Counter()  # parts received of each peer
        self._early: set[_Key] = set()  # let go of before one that came earlier

    def new(self, size: int) -> Tensor | None:
        """Uninitialised memory of my pool, which can be lent without a copy; None where there is no room."""
        self._reclaim()
        room = -(-size // ALIGNMENT) * ALIGNMENT
        start = self._free.take(room)
        if start is None:
            return None
        self._blocks[start] = _Block(start, room, 1)
        return self._hold(self.rank, start, size, (self.rank, start))

    def lend(self, part: Tensor, readers: Sequence[int]) -> int | None:
        """Let these ranks read a part, which is copied into my pool where it is not there; returns where it lies, None
        where there is no room."""
        start = part.data_ptr() - self._base
        block = self._blocks.get(start)
        if block is None:
            copy = self.new(part.numel())
            if copy is None:
                return None
            copy.copy_(part)
            start = copy.data_ptr() - self._base
            block = self._blocks[start]
        block.users += len(readers)
        for reader in readers:
            self._lent[reader].append(block)
        return start

    def view(self, peer: int, start: int, size: int) -> Tensor:
        """What a peer has lent, read in place. The peer uses the memory again when the tensor is gone."""
        number = self._count[peer]
        self._count[peer] += 1
        return self._hold(peer, start, size, (peer, number))

    def publish(self) -> None:
        """Tell the peers what of theirs this rank holds no longer."""
        while self._let_go:
            key = self._let_go.popleft()
            del self._held[key]
            peer = key[0]
            if peer == self.rank:
                self._give_back(self._blocks[key[1]])
                continue
            self._early.add(key)
            table, place = self._read[self.rank], self._place[peer]
            while (peer, table[place]) in self._early:
                self._early.discard((peer, table[place]))
                table[place] += 1

    def _hold(self, owner: int, start: int, size: int, key: _Key) -> Tensor:
        part = self._maps[owner][start : start + size]
        # The interpreter calls this anywhere, so it does no more than note it down.
        self._held[key] = weakref.ref(part, partial(_note, self._let_go, key))
        return torch.from_numpy(part)

    def _reclaim(self) -> None:
        self.publish()
        for peer, blocks in self._lent.items():
            done = self._read[peer][self._place[self.rank]]
            while self._given_back[peer] < done:
                self._given_back[peer] += 1
                self._give_back(blocks.popleft())

    def _give_back(self, block: _Block) -> None:
        block.users -= 1
        if not block.users:
            del self._blocks[block.start]
            self._free.give(block.start, block.size)


def _trade(descriptor: int, peers: Mapping[int, socket.socket], end: float) -> dict[int, mmap.mmap]:
    """Give each peer the descriptor of my pool, and get its pool."""
    found: dict[int, mmap.mmap] = {}
    for what in ("give", "get"):
        for peer, connection in peers.items():
            connection.settimeout(max(0.001, end - time.monotonic()))
            try:
                if what == "give":
                    socket.send_fds(connection, [b"\0"], [descriptor])
                    continue
                data, theirs, _, _ = socket.recv_fds(connection, 1, 1)
            except OSError as error:
                raise CommError(
                    f"rank {peer} of this node shares no memory: {error.strerror or error}"
                ) from None
            if not theirs:
                why = "no descriptor is free" if data else "it closed its connection"
                raise CommError(f"rank {peer} of this node shares no memory: {why}")
            found[peer] = mmap.mmap(theirs[0], POOL)
            os.close(theirs[0])
    return found


def _note(noted: "deque[_Key]", key: _Key, _: object) -> None:
    noted.append(key)
