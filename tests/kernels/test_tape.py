"""Ops that are recorded and run again."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.tape import Pool, Tape
from tests.kernels.test_ops import NATIVE, Kind
from tests.support.attention import normal

BF16 = torch.bfloat16
each_kind = pytest.mark.parametrize("kind", NATIVE[:1], ids=repr)


def test_memory_is_taken_again_when_no_tensor_is_on_it() -> None:
    pool = Pool()
    first = pool.empty((4, 5), BF16)
    address = first.data_ptr()
    view = first[2:]
    del first
    assert pool.empty((4, 5), BF16).data_ptr() != address  # a view is a tensor too
    del view
    assert pool.empty((3, 5), BF16).data_ptr() == address
    assert pool.empty((0, 7), torch.int64).shape == (0, 7)


def test_a_small_piece_takes_no_large_one() -> None:
    pool = Pool()
    address = pool.empty((1 << 20,), BF16).data_ptr()
    assert pool.empty((8,), BF16).data_ptr() != address


@each_kind
def test_what_is_run_again_reads_what_is_there_now(kind: Kind) -> None:
    graph = kind.kernels.graph
    assert graph is not None
    x, weight = normal(3, 40, seed=1, dtype=BF16), kind.matrix(normal(40, 40, seed=2, dtype=BF16, scale=0.1))

    def compute(x: Tensor) -> Tensor:
        for _ in range(5):
            x = kind.kernels.add(x, kind.kernels.linear(x, weight))
        return x

    tape = Tape(Pool())
    with graph.recording(tape):
        out = compute(x)
    assert tape.whole and torch.equal(out, compute(x))
    x.copy_(normal(3, 40, seed=3, dtype=BF16))
    expected = compute(x)
    assert not torch.equal(out, expected)
    for _ in range(2):
        graph.replay(tape)
        assert torch.equal(out, expected)


@each_kind
def test_what_a_tape_does_not_know_spoils_it(kind: Kind) -> None:
    """A head that shares the embedding's weights is computed by library kernels."""
    graph = kind.kernels.graph
    assert graph is not None
    tape = Tape(Pool())
    with graph.recording(tape):
        kind.kernels.logits(normal(1, 8, seed=1, dtype=BF16), normal(4, 8, seed=2, dtype=BF16))
    assert not tape.whole


@each_kind
def test_what_is_copied_to_be_contiguous_spoils_a_tape(kind: Kind) -> None:
    graph = kind.kernels.graph
    assert graph is not None
    x, tape = normal(8, 4, seed=1, dtype=BF16), Tape(Pool())
    with graph.recording(tape):
        kind.kernels.add(x, x)
    assert tape.whole
    with graph.recording(tape):
        found = kind.kernels.add(x.t(), x.t())
    assert not tape.whole and torch.equal(found, x.t() + x.t())


@pytest.mark.parametrize("kind", NATIVE[:1], ids=repr)
def test_fewer_threads_than_torch_asks_for(kind: Kind) -> None:
    """OpenMP is not bound to give as many: who waited for the others would wait for ever."""
    program = (
        "import torch; from expertmesh.kernels import kernels_for; torch.set_num_threads(2)\n"
        "x = torch.ones(70, 40, dtype=torch.bfloat16); assert (kernels_for('cpu', 'bfloat16').add(x, x) == 2).all()"
    )
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)
