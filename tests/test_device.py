"""Which devices there are, what is said where one is not, and what of a step goes to a card."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import LLM, EngineConfig, InputError, Topology
from expertmesh.device import Device, Room, find, found, free_memory
from tests.support.cards import GB, Library, install


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Library:
    """torch_npu is installed, which makes torch know the name, and there are two cards."""
    torch.utils.rename_privateuse1_backend("npu")
    library = Library([60 * GB, 50 * GB], graphs="NPUGraph")
    module = ModuleType("torch_npu")
    module.__spec__ = type("Spec", (), {})()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    install(monkeypatch, "npu", library)
    return library


def test_a_processor_is_always_there() -> None:
    cpu = find("cpu")
    assert (cpu.kind, cpu.where, cpu.backend, str(cpu)) == ("cpu", torch.device("cpu"), "gloo", "cpu")
    room = cpu.room()
    assert 0 < room.free <= room.total == psutil.virtual_memory().total
    assert not room.dedicated and room.reserve == 0
    assert cpu.clock() <= cpu.clock() and found("cpu") == [cpu]
    cpu.take()  # nothing


def test_free_memory_is_some_of_this_machine() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_auto_without_cards_is_the_processor_and_imports_nothing() -> None:
    assert find("auto") == Device("cpu") and "torch_npu" not in sys.modules


@pytest.mark.parametrize("name", ["gpu", "", "cuda:1", "NPU"])
def test_names_that_are_none(name: str, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=f"^device {name!r} is not one of auto, cpu, cuda, npu$"):
        find(name)
    with pytest.raises(InputError, match="is not one of auto, cpu, cuda, npu"):
        LLM(tiny_folder, device=name)


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(InputError, match=r"^device cuda: torch .* was built without CUDA; install a build"):
        find("cuda")
    assert found("cuda") == []


def test_cuda_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "cuda", Library([]))
    with pytest.raises(InputError, match=r"^device cuda: no card is visible: .*CUDA_VISIBLE_DEVICES"):
        find("cuda")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert find("auto").kind == "cpu"


def test_torch_npu_is_not_installed() -> None:
    wanted = torch.__version__.partition("+")[0]
    with pytest.raises(
        InputError, match=f"^device npu: torch_npu is not installed; pip install torch-npu=={wanted}"
    ):
        find("npu")


def test_torch_npu_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As without CANN. Asked for it is an error; else the next kind of device is taken, and why is said."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"^device npu: torch_npu is installed and cannot be imported \(libhccl.so"
    ):
        find("npu")
    install(monkeypatch, "cuda", Library())
    assert find("auto").kind == "cuda"
    (record,) = caplog.records
    assert "not npu, for torch_npu is installed and cannot be imported" in record.getMessage()


def test_auto_takes_ascend_then_cuda(npu: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "cuda", Library())
    device = find("auto")
    assert (device.kind, device.where, device.backend) == ("npu", torch.device("npu", 0), "hccl")
    npu.free.clear()
    device = find("auto")
    assert (device.kind, device.where, device.backend) == ("cuda", torch.device("cuda", 0), "nccl")


def test_what_a_card_says_of_itself(npu: Library) -> None:
    device = find("npu", 1)
    assert (str(device), device.name, device.library) == ("npu:1", "card number 1", npu)
    assert device.room() == Room(50 * GB, 64 * GB, dedicated=True)
    assert device.room().reserve == 64 * GB // 10 and Room(GB, 2 * GB, True).reserve == GB
    device.take()
    device.clock()
    assert npu.log == [("device", 1), ("synchronize", 1)] and len(found("npu")) == 2


@pytest.mark.usefixtures("npu")
def test_more_ranks_than_cards_are_refused_before_anything_starts(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"have card 2, and 2 cards are visible, .* say --device cpu$"):
        find("npu", 2)
    with pytest.raises(
        InputError, match=r"device npu: a rank of this machine is to have card 7, and 2 cards"
    ):
        LLM(tiny_folder, topology=Topology(2, 4))


@pytest.mark.usefixtures("npu")
def test_ranks_on_cards_are_processes(tiny_folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"^ranks threads: on npu each rank is a process, .*say processes, or --device"
    ):
        LLM(tiny_folder, topology=Topology(1, 2), ranks="threads")
    with pytest.raises(
        InputError, match=r"^rebalance auto: experts move between processors only, not on npu"
    ):
        LLM(tiny_folder, topology=Topology(1, 2), rebalance="auto")


def test_on_a_processor_they_are_threads(tiny_folder: Path) -> None:
    with LLM(tiny_folder, topology=Topology(1, 2), device="cpu") as llm:
        assert (llm.engine.config.ranks, llm.engine.config.device) == ("threads", "cpu")


@given(st.lists(st.lists(st.integers(-(1 << 62), 1 << 62), max_size=5), max_size=6))
def test_numbers_come_over_as_they_are(lists: list[list[int]]) -> None:
    parts = Device("cpu").put(lists)
    assert [part.tolist() for part in parts] == lists
    assert all(part.dtype == torch.int64 and part.is_contiguous() for part in parts)


class OnCard(torch.Tensor):
    """A tensor that writes down how it is copied."""

    log: list[Any]

    def pin_memory(self) -> "OnCard":  # type: ignore[override]
        self.log.append("pinned")
        return self

    def to(self, *args: Any, **kwargs: Any) -> "OnCard":
        self.log.append((*args, kwargs))
        return self


def test_numbers_of_a_step_are_one_pinned_copy_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Logged(OnCard):
        log: list[Any] = []  # noqa: RUF012

    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made(*a, **k).as_subclass(Logged))
    where = torch.device("cuda", 3)
    parts = Device("cuda", 3, where).put([[1, 2], [], [3]])
    assert [part.tolist() for part in parts] == [[1, 2], [], [3]]
    assert Logged.log == ["pinned", (where, {"non_blocking": True})]


def test_staging_on_a_processor_is_one_memory() -> None:
    staging = Device("cpu").staging(4)
    staging.here[1] = 5
    staging.send(4)
    assert staging.here is staging.there and staging.there.tolist() == [0, 5, 0, 0]


def test_a_card_is_filled_up_to_its_reserve() -> None:
    """What running requests can use at most is the other bound."""
    from expertmesh.config import ModelConfig, cache_bytes_per_token
    from tests.support.files import TINY, official_config

    v3 = ModelConfig.from_dict(official_config("deepseek-v3"))
    per_token = cache_bytes_per_token(v3, "bfloat16")
    config = EngineConfig(page_size=128).resolve(v3, 20 * GB, dedicated=True)
    assert config.cache_tokens is not None
    assert 20 * GB - 128 * per_token < config.cache_tokens * per_token < 20 * GB + 128 * per_token
    tiny = EngineConfig().resolve(ModelConfig.from_dict(TINY), 20 * GB, dedicated=True)
    assert tiny.cache_tokens == 64 * 512
