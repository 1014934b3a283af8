"""A step as a graph of a card: torch.cuda.CUDAGraph or torch.npu.NPUGraph, which are captured and run alike."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from expertmesh.kernels.tape import NotCaptured, Recorded

# Steps before the one that is captured: libraries make plans and take memory when they are first called, and compilers
# compile, none of which a graph can hold.
WARM_UPS = 2
GRAPHS = ("CUDAGraph", "NPUGraph")


class CardGraph:
    """Graphs of one rank, which share memory, since they never run at the same time. Implements `tape.Graph`.

    library: torch.cuda or torch.npu.
    """

    ahead = True

    def __init__(self, library: Any) -> None:
        self._library = library
        self._new = next(getattr(library, name) for name in GRAPHS if hasattr(library, name))
        self._pool = library.graph_pool_handle()
        # One stream for all: only what is captured on the same can share memory.
        self._stream = library.Stream()

    def size(self, rows: int) -> int:
        """All up to 8, then four sizes in each octave: there are few graphs, and few rows that do nothing."""
        unit = 1 << max(0, (rows - 1).bit_length() - 3)
        return -(-rows // unit) * unit

    def record(self, compute: Callable[[], Tensor]) -> Recorded:
        library, graph = self._library, self._new()
        current = library.current_stream()
        try:
            self._stream.wait_stream(current)
            with library.stream(self._stream):
                for _ in range(WARM_UPS):
                    compute()
            current.wait_stream(self._stream)
            with library.graph(graph, pool=self._pool, stream=self._stream):
                out = compute()
        except RuntimeError as error:  # torch's own errors, those of memory too, and of the kernels
            library.set_stream(current)  # which a capture that ends badly does not
            raise NotCaptured(str(error).partition("\n")[0]) from error
        return Recorded(out, graph.replay)
