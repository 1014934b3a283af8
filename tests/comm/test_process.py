"""Ranks that talk as processes do: frames of any size in any order, failures that are named, nothing that grows."""

import gc
import os
import queue
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh import Topology
from expertmesh.comm.base import PURPOSES, Comm, CommError, Transfer
from expertmesh.comm.meeting import HELLO, Listener, Place
from expertmesh.comm.process import HEADER, INLINE, SMALL, STAGE, ProcessComm
from tests.support.worlds import SocketWorld

pytestmark = pytest.mark.timeout(300)

LARGE = 6 << 20  # bytes: more than the kernel holds of a connection
FEW = [0, 0, 1, 7, 200]
MANY = [
    SMALL - 1, SMALL, SMALL + 1, STAGE - HEADER.size - 1, STAGE - HEADER.size, STAGE - HEADER.size + 1,
    STAGE, STAGE + 1, 3 * STAGE + 5, LARGE,
]  # fmt: skip
GROUPS = ["all_ranks", "node_ranks", "rail_ranks", "tp_ranks"]
CLUSTERS = [(1, 2, 1), (1, 3, 3), (2, 1, 1), (3, 1, 1), (2, 2, 1), (2, 2, 2), (1, 4, 2)]
PATTERN = ((torch.arange(LARGE) * 13) % 251).to(torch.uint8)


def content(size: int, number: int, sender: int, receiver: int) -> Tensor:
    """Two parts that could be taken for each other differ, and so do neighbouring bytes."""
    return PATTERN[:size] + (number * 7 + sender * 31 + receiver * 17) % 256


def group_of(topology: Topology, name: str, rank: int) -> tuple[int, ...]:
    ranks: tuple[int, ...] = topology.all_ranks() if name == "all_ranks" else getattr(topology, name)(rank)
    return ranks


def play(topology: Topology, seed: int, count: int, comm: Comm) -> None:
    """Exchanges that are the same on all ranks. When a rank waits and for which, how it makes its parts and whether it
    is helped is its own affair."""
    common, own = random.Random(seed), random.Random(seed * 100 + comm.rank)
    under_way: list[tuple[Transfer, list[Tensor]]] = []
    helped = ExitStack()
    for number in range(count):
        ranks = group_of(topology, common.choice(GROUPS), comm.rank)
        purpose, known, same = common.choice(PURPOSES), common.random() < 0.5, common.random() < 0.2
        sizes = [
            [common.choice(MANY if common.random() < 0.1 else FEW) for _ in range(topology.ranks)]
            for _ in range(topology.ranks)
        ]
        if same:  # every rank sends one part to all of its group
            sizes = [[row[0]] * topology.ranks for row in sizes]
        if own.random() < 0.1:
            helped.close()
            if own.random() < 0.5:
                helped.enter_context(comm.helped())

        def made(rank: int, number: int = number, row: list[int] = sizes[comm.rank]) -> Tensor:
            data = content(row[rank], number, comm.rank, rank)
            return comm.new(rank, row[rank]).copy_(data) if own.random() < 0.5 else data.clone()

        parts = (
            [content(sizes[comm.rank][0], number, comm.rank, 0)] * len(ranks)
            if same
            else list(map(made, ranks))
        )
        expected = [content(sizes[r][comm.rank], number, r, 0 if same else comm.rank) for r in ranks]
        coming = [sizes[r][comm.rank] for r in ranks] if known else None
        under_way.append((comm.start(purpose, ranks, parts, coming), expected))
        while len(under_way) > 6 or (under_way and own.random() < 0.4):
            check(*under_way.pop(own.randrange(len(under_way))))
        if own.random() < 0.05:
            time.sleep(own.random() / 100)
    for each in under_way:
        check(*each)
    helped.close()


def check(transfer: Transfer, expected: list[Tensor]) -> None:
    for came, wanted in zip(transfer.wait(), expected, strict=True):
        assert torch.equal(came, wanted)


@settings(max_examples=40)
@given(st.sampled_from(CLUSTERS), st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1, 64, SMALL]))
def test_every_part_arrives_as_it_was(
    cluster: tuple[int, int, int], seed: int, count: int, small: int
) -> None:
    topology = Topology(*cluster)
    SocketWorld(topology, 60, small=small).run(lambda comm: play(topology, seed, count, comm))


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("cluster", [(1, 3, 1), (3, 1, 1)], ids=str)
def test_a_rank_far_ahead_of_the_others(cluster: tuple[int, int, int], helped: bool) -> None:
    """It has started everything before another one begins; they wait in other orders."""
    started = threading.Event()
    count = 400

    def program(comm: Comm) -> None:
        with comm.helped() if helped else ExitStack():
            if comm.rank:
                assert started.wait(60)
            under_way = []
            for number in range(count):
                parts = [content(number * 37, number, comm.rank, r) for r in range(3)]
                under_way.append(comm.start("dispatch", (0, 1, 2), parts))
            started.set()
            order = list(range(count))
            random.Random(comm.rank).shuffle(order)
            for number in order:
                check(under_way[number], [content(number * 37, number, r, comm.rank) for r in range(3)])

    SocketWorld(Topology(*cluster), 60).run(program)


def test_what_is_sent_goes_on_while_a_helped_rank_computes() -> None:
    """More than the kernel holds, to a rank that reads all of it before the sender does anything else."""
    read = threading.Event()

    def program(comm: Comm) -> None:
        with comm.helped():
            parts = [PATTERN if r != comm.rank else PATTERN[:0] for r in range(2)]
            transfer = comm.start("dispatch", (0, 1), parts)
            if comm.rank == 0:
                assert read.wait(60)
            transfer.wait()
            read.set()

    SocketWorld(Topology(2, 1), 60).run(program)


def test_a_helped_rank_leaves_nothing_unsent() -> None:
    """Nobody moves what is left over when the rank has gone on to something else."""
    read = threading.Event()

    def program(comm: Comm) -> None:
        with comm.helped():
            parts = [PATTERN if r != comm.rank else PATTERN[:0] for r in range(2)]
            sizes = [0, 0] if comm.rank == 0 else [LARGE, 0]
            transfer = comm.start("dispatch", (0, 1), parts if comm.rank == 0 else parts[1:] * 2, sizes)
            if comm.rank == 0:
                transfer.wait()
        if comm.rank == 0:
            assert read.wait(60)
        else:
            check(transfer, [PATTERN, PATTERN[:0]])
            read.set()

    SocketWorld(Topology(2, 1), 60).run(program)


def problem_of(transfer: Transfer) -> CommError:
    with pytest.raises(CommError) as caught:
        transfer.wait()
    return caught.value


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("cluster", [(1, 4, 1), (4, 1, 1), (2, 2, 1)], ids=str)
def test_a_rank_that_ends_is_named_by_all_who_wait_for_it(
    cluster: tuple[int, int, int], helped: bool
) -> None:
    """Also by one that waits already, and where much is on its way to it."""
    gone = threading.Event()

    def program(comm: Comm) -> str:
        assert isinstance(comm, ProcessComm)
        ranks = comm.topology.all_ranks()
        with comm.helped() if helped else ExitStack():
            comm.exchange("dispatch", ranks, [content(9, 0, comm.rank, r) for r in ranks])
            if comm.rank == 2:
                comm.close()
                gone.set()
                return ""
            transfer = comm.start("combine", ranks, [PATTERN if r == 2 else PATTERN[:1] for r in ranks])
            if comm.rank == 0:
                assert gone.wait(60)
            return str(problem_of(transfer))

    said = SocketWorld(Topology(*cluster), 60).run(program)
    del said[2]
    assert all(text.startswith("rank 2 ") and text.endswith(", in combine") for text in said), said


@pytest.mark.parametrize("cluster", [(1, 3, 1), (3, 1, 1)], ids=str)
def test_a_rank_that_does_not_come_is_named(cluster: tuple[int, int, int]) -> None:
    over, found = threading.Barrier(3), []

    def program(comm: Comm) -> None:
        if comm.rank != 1:
            found.append(problem_of(comm.start("combine", (0, 1, 2), [PATTERN[:1]] * 3)))
        over.wait(60)

    SocketWorld(Topology(*cluster), 60, patience=0.3).run(program)
    assert [error.suspects for error in found] == [(1,)] * 2
    assert {str(error) for error in found} == {"waits in combine for rank 1, in vain for 0.3 s"}


@pytest.mark.parametrize("helped", [False, True])
def test_a_rank_that_does_not_take_what_is_sent_is_named(helped: bool) -> None:
    """Nothing is expected of it, but the kernel does not hold all."""
    over, found = threading.Barrier(2), []

    def program(comm: Comm) -> None:
        if comm.rank == 0:
            with pytest.raises(CommError) as caught, comm.helped() if helped else ExitStack():
                parts = [PATTERN[:0], torch.cat([PATTERN] * 4)]
                comm.exchange("combine", (0, 1), parts, [0, 0])
            found.append(caught.value)
        over.wait(60)

    SocketWorld(Topology(2, 1), 60, patience=0.3).run(program)
    (error,) = found
    assert error.suspects == (1,)
    assert str(error) == "waits in combine for rank 1 to take its part, in vain for 0.3 s"


def test_an_error_does_not_wait_for_what_is_unsent() -> None:
    """A helped rank that fails says so at once: nobody may be there to take what it has sent."""
    failed = threading.Event()

    def program(comm: Comm) -> None:
        if comm.rank == 0:
            with pytest.raises(ValueError, match="broken"), comm.helped():
                comm.start("combine", (0, 1), [PATTERN[:0], torch.cat([PATTERN] * 4)], [0, 0])
                raise ValueError("broken")
            failed.set()
        assert failed.wait(60)

    SocketWorld(Topology(2, 1), 200).run(program)


def test_where_a_rank_waits() -> None:
    first = queue.SimpleQueue[Comm]()

    def program(comm: Comm) -> str | None:
        said = None
        if comm.rank == 0:
            assert comm.where() is None
            first.put(comm)
        else:
            other = first.get(timeout=60)
            while not (said := other.where()):
                time.sleep(0.001)
        comm.exchange("attention", (0, 1), [PATTERN[:1]] * 2)
        assert comm.where() is None
        return said

    said = SocketWorld(Topology(1, 2), 60).run(program)[1]
    assert said is not None and said.startswith("waits in attention for rank 1 for ")


@contextmanager
def one_with_a_raw_peer(timeout: float) -> Iterator[tuple[ProcessComm, socket.socket]]:
    """Rank 0 of two nodes; the test itself is rank 1, and says what it likes."""
    listener, token = Listener("127.0.0.1"), secrets.token_bytes(16)
    with socket.create_connection((listener.place.address, listener.place.port)) as peer:
        peer.sendall(HELLO.pack(token, 1))
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        comm = ProcessComm(
            Topology(2, 1), 0, listener, {1: Place("far", "127.0.0.1", 1, "")}, token, timeout, timeout
        )
        try:
            yield comm, peer
        finally:
            comm.close()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_long_part_that_is_on_its_way_shows() -> None:
    """Its receiver wakes when all of it is there; who looks meanwhile sees that it comes. What is sent shows too."""
    size, came = 1 << 20, list[Tensor]()
    frame = HEADER.pack(0, 0, 0, INLINE, size, 0) + PATTERN[:size].numpy().tobytes()
    with one_with_a_raw_peer(60) as (comm, peer):

        def receive() -> None:
            came.extend(comm.exchange("dispatch", (0, 1), [PATTERN[:9]] * 2))

        def shows(count: int) -> bool:
            return comm.waits() == [HEADER.size + 9 + count, [1], 1]

        thread = threading.Thread(target=receive)
        thread.start()
        for start, end in pairwise((0, 0, HEADER.size, 100, 1000, 200_000)):
            peer.sendall(frame[start:end])
            wait_until(partial(shows, end))
        peer.sendall(frame[200_000:])
        thread.join()
    assert torch.equal(came[1], PATTERN[:size]) and comm.waits() is None


@pytest.mark.parametrize("waits", [True, False])
def test_a_helper_that_fails_is_the_failure_of_its_rank(waits: bool) -> None:
    """Whether the rank waits for what the helper moves, or comes to the end of what is helped."""
    with one_with_a_raw_peer(20) as (comm, peer):
        with pytest.raises(RuntimeError, match="memory"), comm.helped():
            transfer = comm.start("dispatch", (0, 1), [PATTERN[:0], torch.cat([PATTERN] * 4)])
            peer.sendall(HEADER.pack(0, 0, 0, INLINE, 1 << 60, 0))  # more than any machine has
            if waits:
                transfer.wait()
            else:
                wait_until(lambda: all(thread.name != "helper" for thread in threading.enumerate()))
        with pytest.raises(RuntimeError, match="memory"), comm.helped():
            comm.start("dispatch", (0, 1), [PATTERN[:0], PATTERN])


def test_thousands_of_exchanges_take_no_more_than_a_few() -> None:
    """Neither descriptors nor memory: the same few pages of the pool are used again and again."""
    counts: list[int] = []
    together = threading.Barrier(3, lambda: counts.append(len(os.listdir("/proc/self/fd"))))

    def program(comm: Comm) -> int:
        places: set[int] = set()
        with comm.helped():
            for turn in range(1600):
                if turn in (100, 1599):
                    together.wait(60)
                size = SMALL if turn % 2 else 40
                parts = [comm.new(r, size) for r in range(3)]
                if size == SMALL:
                    places |= {part.data_ptr() for r, part in enumerate(parts) if r != comm.rank}
                came = comm.exchange("dispatch", (0, 1, 2), parts)
                comm.exchange("combine", (0, 1, 2), came, [size] * 3)
        return len(places)

    found = SocketWorld(Topology(1, 3), 60).run(program)
    # A helper has a descriptor of its own, from when it is needed first.
    assert counts[1] <= counts[0] + 2 * 3 and max(found) < 40


def test_a_closed_cluster_leaves_nothing() -> None:
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()

    def program(comm: Comm) -> None:
        with comm.helped():
            comm.exchange("dispatch", (0, 1, 2, 3), [PATTERN] * 4)

    SocketWorld(Topology(2, 2), 60).run(program)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors and threading.active_count() == threads


# How they meet


@contextmanager
def strangers(place: Place) -> Iterator[None]:
    """Call where a rank listens, and are no ranks of its cluster."""
    wrong = HELLO.pack(b"x" * 16, 1)
    with ExitStack() as stack:
        for near in (False, True):
            for words in (
                b"",
                b"",
                b"",
                b"GET / HTTP/1.0\r\nHost: somebody\r\n\r\n",
                wrong,
                wrong[:7],
                wrong[:19],
                None,
            ):
                caller = stack.enter_context(socket.socket(socket.AF_UNIX if near else socket.AF_INET))
                caller.connect(f"\0{place.local}" if near else (place.address, place.port))
                if words is None:
                    caller.close()
                else:
                    caller.sendall(words)
        yield


def meeting(topology: Topology, timeout: float, late: dict[int, float]) -> dict[int, ProcessComm | CommError]:
    """All ranks take their seats, some late or (inf) never; strangers call rank 0 before."""
    listeners = [Listener("127.0.0.1") for _ in range(topology.ranks)]
    places = {rank: listener.place for rank, listener in enumerate(listeners)}
    token, found = secrets.token_bytes(16), dict[int, ProcessComm | CommError]()

    def come(rank: int) -> None:
        time.sleep(late.get(rank, 0.0))
        # As in the exchange of two tiers: its node and its rail.
        peers = {*topology.node_ranks(rank), *topology.rail_ranks(rank)} - {rank}
        others = {peer: places[peer] for peer in peers}
        try:
            found[rank] = ProcessComm(topology, rank, listeners[rank], others, token, timeout, 60)
        except CommError as error:
            found[rank] = error

    coming = [rank for rank in range(topology.ranks) if late.get(rank) != float("inf")]
    threads = [threading.Thread(target=come, args=(rank,)) for rank in coming]
    with strangers(listeners[0].place):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for listener in listeners:
        listener.close()
    return found


def test_strangers_hold_up_nobody() -> None:
    found = meeting(Topology(2, 2), 20, {})
    for comm in found.values():
        assert isinstance(comm, ProcessComm)
        comm.close()


def test_a_rank_that_is_late_is_waited_for() -> None:
    """Also by the others of a node that wait for one that waits for it."""
    found = meeting(Topology(2, 2), 60, {3: 5.5})
    for comm in found.values():
        assert isinstance(comm, ProcessComm), comm
        comm.close()


def test_a_rank_that_never_connects_is_named() -> None:
    found = meeting(Topology(1, 4), 2, {2: float("inf"), 3: float("inf")})
    host = socket.gethostname()
    assert str(found[0]) == f"rank 2 on {host} did not connect (nor did ranks [3])"
    # Rank 1 waits as long, or is told by rank 0 that it has given up.
    assert isinstance(found[1], CommError)


def test_a_rank_that_does_not_listen_is_named() -> None:
    listeners = [Listener("127.0.0.1") for _ in range(2)]
    listeners[0].close()
    for topology, where in (
        (Topology(2, 1), f"on {socket.gethostname()} at 127.0.0.1:"),
        (Topology(1, 2), "of this node:"),
    ):
        listener = Listener("127.0.0.1")
        with pytest.raises(CommError, match=f"cannot reach rank 0 {where}"):
            ProcessComm(topology, 1, listener, {0: listeners[0].place}, b"0" * 16, 5, 5)
    listeners[1].close()
