"""What is asked of a card, with functions in the place of torch.cuda's."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertmesh.bench.accelerator.checks import median_seconds
from expertmesh.bench.accelerator.sizes import CPU
from expertmesh.bench.accelerator.spot import count, find, spot


class Clock:
    """Events of a card on which everything takes 2 ms."""

    ticks = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Clock.ticks += 1
        self.at = Clock.ticks

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Clock") -> float:
        return 2.0 * (later.at - self.at)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    heard: list[Any] = []
    cuda = SimpleNamespace(
        Event=Clock, synchronize=lambda: heard.append("synchronize"), mem_get_info=lambda: (3, 5),
        set_device=lambda index: heard.append(("set_device", index)), is_available=lambda: True,
        device_count=lambda: 4, CUDAGraph=lambda: SimpleNamespace(replay=lambda: heard.append("replay")),
        graph=lambda graph: nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.delattr(torch, "npu", raising=False)
    return heard


def test_a_card_has_a_clock_and_a_memory_of_its_own(asked: list[Any]) -> None:
    here = spot("cuda", 2)
    here.enter()
    assert here.card and here.memory() == (3, 5) and asked == [("set_device", 2)]
    assert median_seconds(lambda: None, here, CPU) == pytest.approx(2e-3)
    again, out = here.capture(lambda: 7)
    again()
    assert out == 7 and asked[-1] == "replay"


def test_auto_takes_what_is_there(asked: list[Any]) -> None:
    assert find("auto") == find("cuda") == "cuda" and (count("cuda"), count("npu")) == (4, 0)


def test_a_processor_has_neither(asked: list[Any]) -> None:
    here = spot("cpu")
    here.enter()
    here.synchronise()
    assert not here.card and here.memory()[0] > 0 and asked == []
