"""Memory for weights."""

import mmap
from typing import Any

import pytest

from expertmesh.kernels import memory
from expertmesh.kernels.memory import LINE, SLAB, Arena


def test_pieces_begin_on_a_line_and_do_not_overlap() -> None:
    arena = Arena()
    pieces = [arena.take(size) for size in (1, 100, 0, SLAB, SLAB - 1, 64)]
    for i, piece in enumerate(pieces):
        assert piece.data_ptr() % LINE == 0 and not piece[:1].any()
        piece.fill_(i + 1)
    assert all((piece == i + 1).all() for i, piece in enumerate(pieces))


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Small)
    assert Arena().take(100).numel() == 100
