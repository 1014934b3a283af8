"""The checkers themselves: they count what is there, and find what is wrong."""

import pytest

from tests.kernels.triton.handshakes import TURNS, mismatch
from tests.kernels.triton.nesting import nested
from tests.kernels.triton.traffic import Traffic, traffic

SET = "hivm.hir.sync_block_set[<CUBE>, <PIPE_FIX>, <PIPE_S>] flag = {} ffts_base_addr = %arg0"
WAIT = "hivm.hir.sync_block_wait[<VECTOR>, <PIPE_FIX>, <PIPE_S>] flag = {}"
BOUNDS = "%c0 = arith.constant 0 : index\n%c3 = arith.constant 3 : index\n%c1 = arith.constant 1 : index\n"


def loop(*lines: str, last: str = "%c3", end: str = "}") -> str:
    return "\n".join((f"{BOUNDS}scf.for %i = %c0 to {last} step %c1 {{", *lines, end))


def lines(*signals: str) -> str:
    return "\n".join(signals)


@pytest.mark.parametrize(
    ("matrix", "vector"),
    [
        (SET.format(0), WAIT.format(0)),
        (loop(SET.format(0)), loop(WAIT.format(0))),
        (loop(SET.format(0)), lines(*[WAIT.format(0)] * 3)),
        (loop(SET.format(0), last="%n"), lines(*[WAIT.format(0)] * TURNS)),
        (loop(SET.format(0), last="%n", end="} {multibuffer_unroll_factor = 2 : i32}"), lines(*[WAIT.format(0)] * 2)),
        (lines(SET.format(0), SET.format(1)), lines(WAIT.format("%5"), WAIT.format("%6"))),
        (lines(SET.format(0), WAIT.format(1)), lines(SET.format(1), WAIT.format(0))),
        ("", ""),
    ],
)  # fmt: skip
def test_parts_that_wait_as_often_as_they_signal_match(matrix: str, vector: str) -> None:
    # A flag that is chosen belongs to its pipe wherever it stands.
    if "%5" in vector:
        matrix = matrix.replace("flag = 1", "flag = %7")
    assert mismatch(matrix, vector) == ""


@pytest.mark.parametrize(
    ("matrix", "vector", "said"),
    [
        (SET.format(0), "", "nobody waits for"),
        ("", WAIT.format(0), "wait for each other"),
        (SET.format(1), WAIT.format(0), "wait for each other"),
        (loop(SET.format(0)), loop(WAIT.format(0), WAIT.format(0)), "wait for each other"),
        (lines(WAIT.format(1), SET.format(0)), lines(WAIT.format(0), SET.format(1)), "wait for each other"),
    ],
)
def test_parts_that_do_not_match_are_told(matrix: str, vector: str, said: str) -> None:
    assert said in mismatch(matrix, vector)


def test_a_signal_that_a_condition_decides_about_is_refused() -> None:
    with pytest.raises(ValueError, match="condition"):
        mismatch(f"scf.if %1 {{\n{SET.format(0)}\n}}", WAIT.format(0))


def test_loops_in_loops_are_run_as_often_as_they_say() -> None:
    text = loop(loop("here", "here"), "here")
    assert len(list(nested(text, lambda line: line == "here" or None, 1).run())) == 3 * (3 * 2 + 1)


def test_bytes_and_operations_are_counted_with_their_loops() -> None:
    load = "%x = tt.load %p, %m, %c : tensor<64x32x!tt.ptr<bf16>> loc(#loc1)"
    dot = "%d = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<16x32xbf16> * tensor<32x8xbf16> -> tensor<16x8xf32>"
    text = "\n".join(
        (loop(load, dot), "%s = tt.load %q : !tt.ptr<i64>", "tt.store %p, %v : tensor<4x!tt.ptr<f32>>")
    )
    assert traffic(text) == Traffic(3 * 64 * 32 * 2 + 8, 16, 3 * 2 * 16 * 32 * 8)
