"""Ranks as processes: frames over stream sockets, and inside a node parts that are read in place.

A frame is a header, which says what it belongs to and how long it is, and a part; or, to a rank of the same node, a
header that says where in the sender's memory the part lies. So no length is agreed on before, and each part is here
when its own frame is, whatever else is under way.
"""

import fcntl
import selectors
import socket
import struct
import sys
import termios
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, CommError, Done, Purpose, Transfer
from expertmesh.comm.helper import Helper
from expertmesh.comm.meeting import Listener, Place
from expertmesh.comm.shared import NodeMemory
from expertmesh.mesh.topology import Topology

# Number of the group, fiber, number of the exchange among these, how the part comes, its length, where it lies.
HEADER = struct.Struct("<BBIBQQ")
INLINE, SHARED = 0, 1
SMALL = 1 << 14  # bytes: what is shorter is sent behind its header, also inside a node
STAGE = 1 << 16  # bytes that are read at once
_Tag: TypeAlias = tuple[int, int, int]


@dataclass
class _Peer:
    """One connection: what still has to be sent, and what has come of the frame that arrives."""

    rank: int
    socket: socket.socket
    sending: "deque[tuple[memoryview, _ProcessTransfer]]" = field(default_factory=deque)
    header: bytes = b""  # the beginning of one that has not come whole
    tag: _Tag = (0, 0, 0)
    part: Tensor | None = None
    rest: memoryview | None = None  # of that part
    broken: str | None = None
    expected: int = 1

    def expect(self, count: int) -> None:
        """Tell of what comes when so many bytes are there, not with every packet."""
        if count != self.expected:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(count, 1 << 30))
            self.expected = count

    def unread(self) -> int:
        """Bytes that the kernel holds. Any thread may ask."""
        with suppress(OSError, ValueError):  # it has been closed
            return int.from_bytes(fcntl.ioctl(self.socket, termios.FIONREAD, bytes(4)), sys.byteorder)
        return 0


class ProcessComm(Comm):
    """One process's end. Every rank of the cluster creates it at the same time.

    Who waits moves the bytes of all that is under way, and the kernel what fits into its buffers. In `helped`, for a
    rank that computes while its rows travel, a thread moves what does not.
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        listener: Listener,
        places: Mapping[int, Place],
        token: bytes,
        timeout: float,
        patience: float,
    ) -> None:
        """places: where the other ranks listen that this one talks with. timeout: seconds until all of them are
        connected; patience: seconds until one that does not come to an exchange is given up. CommError: not all could
        be reached."""
        super().__init__(topology, rank)
        self.patience = patience
        node = topology.node_ranks(rank)
        end = time.monotonic() + timeout
        sockets = listener.meet(rank, places, [peer for peer in node if peer in places], token, timeout)
        near = {peer: sockets[peer] for peer in node if peer in sockets}
        try:
            self._memory = NodeMemory(rank, near, end - time.monotonic())
        except BaseException:
            for connection in sockets.values():
                connection.close()
            raise
        self._near = frozenset(near)
        self._peers = {peer: _Peer(peer, connection) for peer, connection in sockets.items()}
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            peer.socket.setblocking(False)
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)
        groups = [topology.all_ranks(), node, topology.rail_ranks(rank), topology.tp_ranks(rank)]
        # Groups of the same ranks have the same number, whichever was meant.
        self._numbers = {group: number for number, group in reversed(list(enumerate(groups)))}
        self._count: Counter[tuple[int, int]] = Counter()
        self._awaited: dict[_Tag, _ProcessTransfer] = {}
        self._early: dict[_Tag, dict[int, Tensor]] = {}  # what came before this rank asked for it
        self._stage = memoryview(bytearray(STAGE))
        self._waiting: tuple[_ProcessTransfer, float] | None = None
        self._news = threading.Condition()
        self._moved = 0  # bytes
        self._may_help = False
        self._helper = Helper(self._selector, self._news, self._move)

    def start(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> Transfer:
        self.sent.add(purpose, ranks, [p.numel() for p in parts], announced=sizes is None)
        if len(ranks) == 1:
            return Done(list(parts))
        group = self._numbers[tuple(ranks)], self.turns.lane
        tag = (*group, self._count[group] & 0xFFFFFFFF)
        self._count[group] += 1
        transfer = _ProcessTransfer(self, purpose, tag, tuple(ranks))
        others = [i for i, r in enumerate(ranks) if r != self.rank]
        with self._news:
            transfer.came[self.rank] = parts[ranks.index(self.rank)]
            # Of what is known to be empty nothing is sent.
            transfer.missing = {ranks[i] for i in others if sizes is None or sizes[i]}
            self._awaited[tag] = transfer
            for peer, part in self._early.pop(tag, {}).items():
                transfer.arrived(peer, part)
            self._send(transfer, [(ranks[i], parts[i]) for i in others if sizes is None or len(parts[i])])
        if self._may_help and not self._helper.active and self._unsent:
            self._helper.resume()
        return transfer

    def new(self, rank: int, size: int) -> Tensor:
        part = self._memory.new(size) if rank in self._near and size >= SMALL else None
        return torch.empty(size, dtype=torch.uint8) if part is None else part

    @contextmanager
    def helped(self) -> Iterator[None]:
        self._may_help = True
        try:
            yield
        finally:
            self._may_help = False
            if self._helper.active:
                self._helper.pause()
        self._drain()  # not where something has failed: who does not take what is sent may be why

    def waits(self) -> list[Any] | None:
        if (waiting := self._waiting) is None:
            return None
        # This rank hears of a long part when it is whole: until then the kernel alone knows that more comes.
        unread = sum(peer.unread() for peer in self._peers.values())
        return [self._moved + unread, sorted(waiting[0].missing), self._count.total()]

    def where(self) -> str | None:
        """What this rank waits for, and since when."""
        if (waiting := self._waiting) is None:
            return None
        transfer, since = waiting
        return f"{transfer.describe()} for {time.monotonic() - since:.1f} s"

    def close(self) -> None:
        self._helper.close()
        self._selector.close()
        for peer in self._peers.values():
            peer.socket.close()

    def unsent_to(self, transfer: "_ProcessTransfer") -> list[int]:
        """Ranks that have not taken what is theirs of a transfer."""
        peers = list(self._peers.values())
        return [p.rank for p in peers if any(each is transfer for _, each in list(p.sending))]

    @property
    def _unsent(self) -> bool:
        return any(peer.sending for peer in self._peers.values())

    # Waiting, by the rank's own thread

    def finish(self, transfer: "_ProcessTransfer") -> list[Tensor]:
        """See `Transfer.wait`. What this rank sends has left it then too, if there is no helper to see to that. What
        the helper has failed with is raised."""
        self._waiting = transfer, time.monotonic()
        end = time.monotonic() + self.patience
        with self._news:
            while transfer.missing or (transfer.unsent and not self._helper.active):
                if broken := [p for p in transfer.missing if self._peers[p].broken]:
                    raise CommError(
                        f"rank {broken[0]} {self._peers[broken[0]].broken}, in {transfer.purpose}"
                    )
                left = end - time.monotonic()
                if left <= 0:
                    raise self._in_vain(transfer)
                if self._helper.failed:
                    self._helper.pause()
                elif self._helper.active:
                    self._news.wait(left)
                else:
                    self._move(self._selector.select(left))
            del self._awaited[transfer.tag]
            self._memory.publish()
        self._waiting = None
        if self._helper.active and not self._unsent:
            self._helper.pause()
        return [transfer.came.get(r, _NOTHING) for r in transfer.ranks]

    def _drain(self) -> None:
        """Send what the helper has not sent yet: others wait for it, and this rank may not come here for long."""
        end = time.monotonic() + self.patience
        with self._news:
            while left_over := [peer.sending[0][1] for peer in self._peers.values() if peer.sending]:
                if (left := end - time.monotonic()) <= 0:
                    raise self._in_vain(left_over[0])
                self._move(self._selector.select(left))

    def _in_vain(self, transfer: "_ProcessTransfer") -> CommError:
        return CommError(f"{transfer.describe()}, in vain for {self.patience:g} s", transfer.awaited)

    # Moving bytes, by who waits or by the helper; the lock of `_news` is held

    def _move(self, events: "list[tuple[selectors.SelectorKey, int]]") -> None:
        for key, event in events:
            peer: _Peer | None = key.data
            if peer is None or peer.broken:
                continue
            try:
                if event & selectors.EVENT_WRITE:
                    self._flush(peer)
                if event & selectors.EVENT_READ:
                    self._receive(peer)
            except OSError as error:
                self._lose(peer, f"is not there any more ({error.strerror or error})")

    def _lose(self, peer: _Peer, why: str) -> None:
        peer.broken = why
        self._selector.unregister(peer.socket)
        for _, transfer in peer.sending:
            transfer.unsent -= 1
        peer.sending.clear()
        self._news.notify_all()

    def _send(self, transfer: "_ProcessTransfer", parts: Sequence[tuple[int, Tensor]]) -> None:
        """What leaves the node leaves first. A part that several ranks of the node get is put into memory once."""
        shared: dict[int, tuple[Tensor, list[int]]] = {}
        for rank, part in parts:
            if rank in self._near and part.numel() >= SMALL:
                shared.setdefault(id(part), (part, []))[1].append(rank)
            else:
                self._push(rank, transfer, INLINE, part, 0)
        for part, ranks in shared.values():
            start = self._memory.lend(part, ranks)
            for rank in ranks:
                if start is None:  # no room: others still read what was put there
                    self._push(rank, transfer, INLINE, part, 0)
                else:
                    self._push(rank, transfer, SHARED, part, start)

    def _push(self, rank: int, transfer: "_ProcessTransfer", how: int, part: Tensor, start: int) -> None:
        peer = self._peers[rank]
        if peer.broken:
            return  # seen by who awaits something from it
        header = memoryview(HEADER.pack(*transfer.tag, how, part.numel(), start))
        frame = [header, _memory(part)] if how == INLINE and len(part) else [header]
        if not peer.sending:
            try:
                count = peer.socket.sendmsg(frame)
                self._moved += count
                frame = _behind(frame, count)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(peer, f"is not there any more ({error.strerror or error})")
                return
            if frame:
                self._selector.modify(peer.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)
        transfer.unsent += len(frame)
        peer.sending.extend((piece, transfer) for piece in frame)

    def _flush(self, peer: _Peer) -> None:
        while peer.sending:
            pieces = [piece for piece, _ in peer.sending]
            try:
                count = peer.socket.sendmsg(pieces[:64])
            except BlockingIOError:
                return
            self._moved += count
            left = _behind(pieces, count)
            for _ in range(len(pieces) - len(left)):
                peer.sending.popleft()[1].unsent -= 1
            if left:
                peer.sending[0] = left[0], peer.sending[0][1]
        self._selector.modify(peer.socket, selectors.EVENT_READ, peer)

    def _receive(self, peer: _Peer) -> None:
        """Read what is there. Long parts go where they belong at once."""
        while True:
            target = self._stage if peer.rest is None else peer.rest
            try:
                count = peer.socket.recv_into(target)
            except BlockingIOError:
                peer.expect(1 if peer.rest is None else len(peer.rest))
                return
            self._moved += count
            if not count:
                self._lose(peer, "closed its connection")
                return
            if peer.rest is None:
                self._read(peer, memoryview(peer.header + self._stage[:count]))
                if count < STAGE and peer.rest is None:
                    peer.expect(1)
                    return
            elif count < len(peer.rest):
                peer.rest = peer.rest[count:]
            else:
                assert peer.part is not None
                peer.rest = None
                self._arrived(peer, peer.tag, peer.part)

    def _read(self, peer: _Peer, data: memoryview) -> None:
        """Frames that have been read, the last one perhaps in part."""
        while len(data) >= HEADER.size:
            *tag, how, size, start = HEADER.unpack_from(data)
            peer.tag, data = (tag[0], tag[1], tag[2]), data[HEADER.size :]
            if how == SHARED:
                self._arrived(peer, peer.tag, self._memory.view(peer.rank, start, size))
                continue
            peer.part = torch.empty(size, dtype=torch.uint8)
            target, here = _memory(peer.part), min(size, len(data))
            target[:here], data = data[:here], data[here:]
            if here < size:
                peer.rest = target[here:]
            else:
                self._arrived(peer, peer.tag, peer.part)
        peer.header = bytes(data)

    def _arrived(self, peer: _Peer, tag: _Tag, part: Tensor) -> None:
        if transfer := self._awaited.get(tag):
            transfer.arrived(peer.rank, part)
            if not transfer.missing:
                self._news.notify_all()
        else:
            self._early.setdefault(tag, {})[peer.rank] = part


_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(eq=False)
class _ProcessTransfer:
    """Implements `comm.base.Transfer`. missing: ranks whose part has not come; unsent: pieces of frames to others that
    have not left."""

    comm: ProcessComm
    purpose: Purpose
    tag: _Tag
    ranks: tuple[int, ...]
    came: dict[int, Tensor] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    unsent: int = 0

    def wait(self) -> list[Tensor]:
        return self.comm.finish(self)

    def arrived(self, peer: int, part: Tensor) -> None:
        self.missing.remove(peer)
        self.came[peer] = part

    @property
    def awaited(self) -> list[int]:
        """Whose parts have not come; where all have, who has not taken this rank's."""
        return sorted(self.missing) or self.comm.unsent_to(self)

    def describe(self) -> str:
        awaited, taking = self.awaited, "" if self.missing else " to take its part"
        more = f" and {len(awaited) - 8} more" if len(awaited) > 8 else ""
        return f"waits in {self.purpose} for rank {', '.join(map(str, awaited[:8]))}{more}{taking}"


def _memory(part: Tensor) -> memoryview:
    return memoryview(part.numpy())  # type: ignore[arg-type]


def _behind(pieces: list[memoryview], count: int) -> list[memoryview]:
    """What follows the first `count` bytes."""
    for number, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[number + 1 :]]
        count -= len(piece)
    return []
