"""How the processes of a cluster connect: each listens, tells everybody where, and is reached by those it talks with.

That a peer can be reached is found out here, in bounded time, before anything waits for rows.
"""

import secrets
import selectors
import socket
import struct
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from expertmesh.comm.base import CommError

HELLO = struct.Struct("!16sI")  # the cluster's token, which keeps strangers out, and the caller's rank
ROOM = 4 << 20  # bytes of a connection in either direction
BACKLOG = 4096  # as many as may call before one is accepted; the system lowers it to what it allows


@dataclass(frozen=True)
class Place:
    """Where a rank listens: an address of one interface, and for ranks of its node a socket without a network (a name
    in Linux's abstract namespace: it leaves no file behind)."""

    host: str
    address: str
    port: int
    local: str


class Listener:
    """Where one rank is called."""

    def __init__(self, address: str) -> None:
        """address: of the interface that other nodes reach. OSError where it is not one of this machine's."""
        self._near = socket.socket(socket.AF_UNIX)
        self._far = socket.socket(socket.AF_INET)
        name = f"expertmesh-rank-{secrets.token_hex(8)}"
        self._near.bind(f"\0{name}")
        _make_room(self._far)
        self._far.bind((address, 0))
        for each in (self._near, self._far):
            each.listen(BACKLOG)
        self.place = Place(socket.gethostname(), address, self._far.getsockname()[1], name)

    def meet(
        self,
        rank: int,
        places: Mapping[int, Place],
        near: Collection[int],
        token: bytes,
        timeout: float,
    ) -> dict[int, socket.socket]:
        """A connection to every rank of `places`, without a network to those of `near`. Every one of them calls this
        at the same time: who has the higher rank calls, the other one answers. CommError names who was not reached, or
        did not call, within `timeout` seconds. The listener is closed."""
        end = time.monotonic() + timeout
        found: dict[int, socket.socket] = {}
        try:
            for peer in sorted(peer for peer in places if peer < rank):
                found[peer] = _call(peer, places[peer], peer in near, end)
                found[peer].sendall(HELLO.pack(token, rank))
            self._answer(found, {peer for peer in places if peer > rank}, places, token, end)
            for connection in found.values():
                if connection.family == socket.AF_INET:
                    _tune(connection, timeout)
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        finally:
            self.close()
        return found

    def close(self) -> None:
        self._near.close()
        self._far.close()

    def _answer(
        self,
        found: dict[int, socket.socket],
        missing: set[int],
        places: Mapping[int, Place],
        token: bytes,
        end: float,
    ) -> None:
        """All callers are heard at the same time: one that does not say who it is holds up nobody."""
        callers: set[socket.socket] = set()  # of whom nobody knows yet who they are
        try:
            with selectors.DefaultSelector() as selector:
                for each in (self._near, self._far):
                    selector.register(each, selectors.EVENT_READ, None)
                while missing:
                    left = end - time.monotonic()
                    if left <= 0:
                        first = min(missing)
                        others = f" (nor did ranks {sorted(missing - {first})})" if len(missing) > 1 else ""
                        raise CommError(f"rank {first} on {places[first].host} did not connect{others}")
                    for event, _ in selector.select(left):
                        connection, said = event.fileobj, event.data
                        assert isinstance(connection, socket.socket)
                        if said is None:
                            caller, _ = connection.accept()
                            caller.setblocking(False)
                            callers.add(caller)
                            selector.register(caller, selectors.EVENT_READ, bytearray())
                        elif not _hears(connection, said):
                            selector.unregister(connection)
                            peer = _who(said, token)
                            if peer in missing:
                                missing.discard(peer)
                                callers.discard(connection)
                                found[peer] = connection
        finally:
            for caller in callers:
                caller.close()


def _call(peer: int, place: Place, near: bool, end: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX if near else socket.AF_INET)
    if not near:
        _make_room(connection)
    connection.settimeout(max(0.001, end - time.monotonic()))
    try:
        connection.connect(f"\0{place.local}" if near else (place.address, place.port))
    except OSError as error:
        connection.close()
        where = "of this node" if near else f"on {place.host} at {place.address}:{place.port}"
        raise CommError(f"cannot reach rank {peer} {where}: {error.strerror or error}") from None
    return connection


def _tune(connection: socket.socket, timeout: float) -> None:
    """Send at once, and find out in about `timeout` seconds where nothing comes through any more, though both ends are
    there and the driver hears them. A machine answers these probes however busy its rank is."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        for option, seconds in ((socket.TCP_KEEPIDLE, timeout / 2), (socket.TCP_KEEPINTVL, timeout / 10)):
            connection.setsockopt(socket.IPPROTO_TCP, option, max(1, round(seconds)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _make_room(connection: socket.socket) -> None:
    """Let the kernel hold whole messages, so that they travel while nobody here moves them. Where it allows less, its
    own sizes, which grow, are better."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, option, ROOM)
            if probe.getsockopt(socket.SOL_SOCKET, option) >= ROOM:
                connection.setsockopt(socket.SOL_SOCKET, option, ROOM)


def _hears(connection: socket.socket, said: bytearray) -> bool:
    """Read what a caller says; whether there is more to come."""
    try:
        more = connection.recv(HELLO.size - len(said))
    except BlockingIOError:
        return True
    except OSError:
        return False
    said += more
    return bool(more) and len(said) < HELLO.size


def _who(said: bytearray, token: bytes) -> int | None:
    """The rank of who has said that, None where it is no rank of this cluster."""
    if len(said) < HELLO.size:
        return None
    theirs, rank = HELLO.unpack(said)
    return int(rank) if secrets.compare_digest(theirs, token) else None
