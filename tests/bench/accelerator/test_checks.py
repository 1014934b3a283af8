"""What is asked of a card, with a library in the place of torch.cuda, and kernels that are examined as theirs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.bench.accelerator.checks import check_graph, check_layout, check_streams, median_seconds
from expertmesh.bench.accelerator.outcome import NotApplicable, Wrong
from expertmesh.bench.accelerator.sizes import CPU
from expertmesh.device import Device
from expertmesh.kernels import kernels_for
from expertmesh.kernels.capture import CardGraph
from expertmesh.kernels.table import reference_kernels
from expertmesh.kernels.tape import NotCaptured, Recorded
from tests.support.cards import Library

CARD = Device("cuda")


class Clock:
    """Events of a card on which everything takes 2 ms."""

    ticks = 0

    def record(self) -> None:
        Clock.ticks += 1
        self.at = Clock.ticks

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Clock") -> float:
        return 2.0 * (later.at - self.at)


class Timed(Library):
    def Event(self, enable_timing: bool = False) -> Any:  # type: ignore[override]
        assert enable_timing
        return Clock()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Of a card whose tensors lie on the processor."""
    library = Timed()
    monkeypatch.setattr(Device, "is_card", True)
    monkeypatch.setattr(Device, "library", library)
    return library


def test_a_card_is_timed_by_its_own_clock(library: Library) -> None:
    assert median_seconds(lambda: None, CARD, CPU) == pytest.approx(2e-3)
    assert library.log == [("synchronize", 0)]


def test_what_a_card_recorded_is_run_again_with_other_input(library: Library) -> None:
    assert check_graph(reference_kernels(), CARD) == {} and library.captured
    library.broken = "operation not permitted"
    with pytest.raises(NotCaptured, match="operation not permitted"):
        check_graph(reference_kernels(), CARD)


def test_a_graph_that_gives_other_numbers_is_wrong(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(graph: CardGraph, compute: Any) -> Recorded:
        out: Tensor = compute()
        return Recorded(out, lambda: None)  # which does not see that the input has changed

    monkeypatch.setattr(CardGraph, "record", record)
    with pytest.raises(Wrong, match="gives other numbers"):
        check_graph(reference_kernels(), CARD)


def test_a_processor_records_on_a_tape_and_has_no_streams() -> None:
    cpu, kernels = Device("cpu"), kernels_for("cpu", "bfloat16")
    if kernels.graph is not None:
        assert check_graph(kernels, cpu) == {}
    with pytest.raises(NotApplicable, match="not recorded"):
        check_graph(reference_kernels(), cpu)
    for check in (check_streams, check_layout):
        with pytest.raises(NotApplicable):
            check(kernels, cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_tokens_of_a_card_that_is_not_there_are_no_success() -> None:
    """An exchange that this device has not is one thing, a device that does not work another."""
    from expertmesh import InputError
    from expertmesh.bench.accelerator.worker import Worker

    worker = Worker(CPU, {"kind": "cuda", "rank": 0}, kernels_for)
    with pytest.raises(InputError, match="device cuda"):
        worker.tokens(1, "two_tier", "bf16")
    with pytest.raises(NotApplicable, match="deepep"):
        Worker(CPU, {"kind": "cpu", "rank": 0}, kernels_for).tokens(2, "deepep", "bf16")
