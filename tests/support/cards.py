"""What torch.cuda and torch.npu offer, as far as bookkeeping goes, written from their documentation. Tensors lie on the
processor; a graph holds the ops of a capture and runs them again on the same tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GB = 1 << 30
# Ops whose results the host has to wait for: a capture that meets one fails.
WAITS = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "_to_copy")


class Stream:
    """Writes down who waits for what."""

    def __init__(self, library: "Library") -> None:
        self.library = library
        self.name = f"stream {next(library.numbers)}"

    def wait_stream(self, other: "Stream") -> None:
        self.library.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: "Event") -> None:
        self.library.log.append((self.name, "waits for", event.recorded))


class Event:
    recorded: Any = None  # nothing to wait for

    def __init__(self, library: "Library") -> None:
        self.library = library

    def record(self, stream: Stream) -> None:
        self.recorded = (stream.name, len([entry for entry in self.library.log if entry[0] == stream.name]))
        self.library.log.append((stream.name, "records", self.recorded))


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and "device" not in (kwargs or {})
        if name in WAITS and not copies:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """CUDAGraph and NPUGraph."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass
class Library:
    """free: bytes of each card, of so many in all."""

    free: list[int] = field(default_factory=lambda: [60 * GB])
    total: int = 64 * GB
    graphs: str = "CUDAGraph"
    log: list[Any] = field(default_factory=list)
    captured: list[Any] = field(default_factory=list)
    broken: str = ""

    def __post_init__(self) -> None:
        self.numbers = iter(range(1 << 20))
        self.default = Stream(self)
        self.now = self.default
        setattr(self, self.graphs, Graph)

    def is_available(self) -> bool:
        return bool(self.free)

    def device_count(self) -> int:
        return len(self.free)

    def get_device_name(self, index: int) -> str:
        return f"card number {index}"

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self.free[index], self.total

    def set_device(self, index: int) -> None:
        self.log.append(("device", index))

    def synchronize(self, index: int) -> None:
        self.log.append(("synchronize", index))

    def Stream(self) -> Stream:
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self) -> Stream:
        return self.now

    def set_stream(self, stream: Stream) -> None:
        self.now = stream
        self.log.append(("current", stream.name))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.now
        self.set_stream(stream)
        yield
        self.set_stream(before)

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def graph(self, graph: Graph, pool: str, stream: Stream) -> Iterator[None]:
        """As there, the stream that captures stays the current one where it fails."""
        self.set_stream(stream)
        self.captured.append((pool, stream.name))
        if self.broken:
            raise RuntimeError(self.broken + "\nCompile with device-side assertions")
        with _Recording(graph.calls):
            yield
        self.set_stream(self.default)


def install(monkeypatch: Any, kind: str, library: Library) -> None:
    """This machine has such cards now."""
    monkeypatch.setattr(torch, kind, library, raising=False)
    if kind == "cuda":
        monkeypatch.setattr(torch.version, "cuda", "13.0")
