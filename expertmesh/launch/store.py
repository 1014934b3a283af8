"""torch's key-value store, where processes of a cluster find each other before they are connected.

Its own waits are in C++, where Ctrl-C is not seen; these here are made of short looks.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from expertmesh.errors import InputError, RankFailure

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOK = 0.05  # seconds between two looks
RETRY = 0.2  # seconds between two attempts to connect
ATTEMPT = 5.0  # seconds that one attempt may take: a lost packet must not cost all of the time


class Store:
    """A store that one process hosts and others reach over the network. RankFailure where it is gone."""

    def __init__(self, host: str, port: int, hosts: bool, timeout: float) -> None:
        """timeout: seconds to reach it in, and until an answer of it is given up. RankFailure names the cause.
        InputError where this process is to host it and cannot."""
        from torch.distributed import TCPStore  # takes its time: not before a store is needed

        self._name = f"{host}:{port}"
        if hosts:
            _check_free(host, port)
        else:
            self.address = reach(host, port, timeout)
        # In a thread, for where something else listens there, and never answers.
        opened: queue.SimpleQueue[TCPStore | RuntimeError] = queue.SimpleQueue()
        threading.Thread(
            target=_open, args=(TCPStore, host, port, hosts, timeout, opened), daemon=True
        ).start()
        try:
            found = opened.get(timeout=timeout)
        except queue.Empty:
            raise RankFailure(
                f"{socket.gethostname()} reaches {self._name}, but what listens there is not the store of a cluster"
            ) from None
        if isinstance(found, RuntimeError):
            raise self._lost(found)
        self._store = found

    def set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise self._lost(error) from None

    def add(self, key: str, amount: int) -> int:
        """Count; returns the sum so far."""
        try:
            return int(self._store.add(key, amount))
        except RuntimeError as error:
            raise self._lost(error) from None

    def find(self, key: str) -> str | None:
        """The value that a key has now, if any."""
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise self._lost(error) from None

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        """The value of the first of these keys that has one, None where that takes longer than `timeout` seconds."""
        end = time.monotonic() + timeout
        while True:
            for key in keys:
                if (found := self.find(key)) is not None:
                    return found
            if time.monotonic() >= end:
                return None
            time.sleep(LOOK)

    def _lost(self, error: RuntimeError) -> RankFailure:
        cause = str(error).splitlines()[0]
        return RankFailure(
            f"{socket.gethostname()} has lost the store at {self._name}: its host has ended, or the link is cut "
            f"({cause})"
        )


def hosted(address: str) -> "TCPStore":
    """A store for the libraries by which cards talk, at a free port of this machine's address."""
    from torch.distributed import TCPStore

    return TCPStore(address, 0, is_master=True, wait_for_workers=False)


def joined(address: str, port: int, timeout: float) -> "TCPStore":
    """That store, of another process. RankFailure where it cannot be reached within `timeout` seconds."""
    from torch.distributed import TCPStore

    reach(address, port, timeout)
    return TCPStore(
        address, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False
    )


def reach(host: str, port: int, timeout: float) -> str:
    """Wait until somebody listens there. Returns the address of this machine from which it is reached. RankFailure
    where that takes longer than `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        left = max(0.1, end - time.monotonic())
        try:
            with socket.create_connection((host, port), min(left, ATTEMPT)) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() + RETRY > end:
                raise RankFailure(
                    f"{socket.gethostname()} cannot reach {host}:{port} within {timeout:g} s: {error.strerror or error}"
                ) from None
        time.sleep(RETRY)


def _open(
    kind: "type[TCPStore]",
    host: str,
    port: int,
    hosts: bool,
    timeout: float,
    opened: "queue.SimpleQueue[TCPStore | RuntimeError]",
) -> None:
    try:
        # With many tenants, torch's launcher in the same process gets the same one.
        store = kind(
            host, port, is_master=hosts, timeout=timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
        )  # fmt: skip
        opened.put(store)
    except RuntimeError as error:
        opened.put(error)


def _check_free(host: str, port: int) -> None:
    """InputError where nothing can listen at this port of any interface, as the store does."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"the store of the cluster cannot be at {host}:{port} on {socket.gethostname()}: "
            f"{os.strerror(error.errno or 0)}; take another port, the same on all machines, or end what listens there"
        ) from None
