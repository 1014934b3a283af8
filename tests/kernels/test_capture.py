"""Graphs of a card, on a stand-in for torch.cuda and torch.npu."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.kernels.capture import WARM_UPS, CardGraph
from expertmesh.kernels.tape import NotCaptured
from tests.support.cards import Library


@given(st.integers(1, 4096))
def test_few_sizes_and_few_rows_that_do_nothing(rows: int) -> None:
    graph = CardGraph(Library())
    size = graph.size(rows)
    assert rows <= size <= rows + rows // 4 and graph.size(size) == size and size <= graph.size(rows + 1)
    assert size == rows or rows > 8


def test_there_are_few_sizes() -> None:
    graph = CardGraph(Library())
    assert len({graph.size(rows) for rows in range(1, 65)}) == 8 + 3 * 4
    assert len({graph.size(rows) for rows in range(1, 1025)}) == 8 + 7 * 4


@pytest.mark.parametrize("kind", ["CUDAGraph", "NPUGraph"])
def test_what_is_captured_is_computed_again_from_what_is_there_then(kind: str) -> None:
    library = Library(graphs=kind)
    graph, x, calls = CardGraph(library), torch.arange(3.0), []

    def compute() -> Tensor:
        calls.append(library.current_stream().name)
        y = torch.zeros(3)
        y.index_add_(0, torch.arange(3), x * 2)
        return torch.cat((y, x + 1))

    recorded = graph.record(compute)
    # All on one stream, first to warm up, which begins after what was asked of the card before and is waited for.
    (stream,) = set(calls)
    assert len(calls) == WARM_UPS + 1 and library.captured == [("pool", stream)]
    assert library.log[:3] == [
        (stream, "waits for", "stream 0"),
        ("current", stream),
        ("current", "stream 0"),
    ]
    assert library.log[3] == ("stream 0", "waits for", stream) and library.current_stream() is library.default
    assert recorded.again is not None
    for values in (torch.ones(3), torch.tensor([5.0, 6, 7])):
        x.copy_(values)
        recorded.again()
        assert torch.equal(recorded.out, torch.cat((values * 2, values + 1)))
    other = graph.record(lambda: x * 3)
    assert library.captured == [("pool", stream)] * 2 and other.again is not None


def test_graphs_that_cannot_be_captured_leave_the_stream_as_it_was() -> None:
    library = Library(broken="CUDA error: operation not permitted when stream is capturing")
    with pytest.raises(NotCaptured, match=r"^CUDA error: operation not permitted when stream is capturing$"):
        CardGraph(library).record(lambda: torch.zeros(1))
    assert library.current_stream() is library.default


def test_an_op_that_the_host_waits_for_cannot_be_captured() -> None:
    library = Library()
    with pytest.raises(NotCaptured, match="_local_scalar_dense"):
        CardGraph(library).record(lambda: torch.zeros(int(torch.ones(1))))
    assert library.current_stream() is library.default
