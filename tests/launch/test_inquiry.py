"""Where ranks stand: who may ask a driver, what comes of one that does not answer, and SIGUSR1."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertmesh.launch import inquiry
from expertmesh.launch.inquiry import Inquiries, ask, drivers, tell_on_signal

TABLE = Path("/proc/self/net/unix")
ANSWER = {"during": "step 1", "ranks": [{"rank": 0}]}
# A computation in C of some seconds, in which the main thread sees no signal.
STUCK = """
import hashlib, threading
from expertmesh.launch.inquiry import tell_on_signal
tell_on_signal(lambda: f"in {threading.current_thread().name}", at_once=True)
print("computes", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
"""


@pytest.fixture
def inquiries() -> Iterator[Inquiries]:
    found = Inquiries(lambda: ANSWER)
    yield found
    found.close()


def own() -> list[str]:
    return [name for name, pid in drivers(TABLE).items() if pid == os.getpid()]


def test_a_driver_is_found_and_answers(inquiries: Inquiries) -> None:
    (name,) = own()
    assert [ask(name) for _ in range(3)] == [ANSWER] * 3
    inquiries.close()
    assert own() == []
    with pytest.raises(ConnectionRefusedError):
        ask(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is another user at will")
@pytest.mark.parametrize("side", ["who asks", "who answers"])
def test_another_user(inquiries: Inquiries, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is answered nor believed; root asks whom it likes."""
    (name,) = own()
    if side == "who asks":
        monkeypatch.setattr(inquiry, "peer", lambda _: (1, os.geteuid() + 1))
        with pytest.raises(ConnectionError):
            ask(name)
    else:
        monkeypatch.setattr(inquiry.os, "geteuid", lambda: 4711)
        with pytest.raises(PermissionError, match="another user's"):
            ask(name)


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiry, "PATIENCE", 0.2)
    waiting = threading.Event()
    found = Inquiries(lambda: {"came": waiting.wait(10)})
    try:
        (name,) = own()
        with pytest.raises(OSError):
            ask(name)
    finally:
        waiting.set()
        found.close()


def test_the_table_of_the_kernel(tmp_path: Path) -> None:
    table = tmp_path / "unix"
    line = "0000000000000000: 00000002 00000000 00010000 0001 01 26421 "
    names = [
        "@expertmesh-driver-12-0a1b2c3d",
        "@expertmesh-driver-12-0a1b2c3d",
        "@expertmesh-driver-x-00",
        "/run/x",
        "",
    ]
    table.write_text(
        "Num RefCount Protocol Flags Type St Inode Path\n" + "".join(f"{line}{n}\n" for n in names)
    )
    assert drivers(table) == {"expertmesh-driver-12-0a1b2c3d": 12}


def test_sigusr1_is_answered_while_the_main_thread_is_in_c() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "computes\n"
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            assert process.stderr.readline() == "in signals\n"
        assert process.poll() is None
        process.kill()


def test_sigusr1_in_a_driver(capfd: pytest.CaptureFixture[str]) -> None:
    """Also where others need `set_wakeup_fd`."""
    before: Any = signal.getsignal(signal.SIGUSR1)
    told = threading.Event()

    def text() -> str:
        told.set()
        return "here"

    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        descriptor = signal.set_wakeup_fd(near.fileno())
        try:
            tell_on_signal(text, at_once=False)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert told.wait(10) and far.recv(1) == bytes([signal.SIGUSR1])
        finally:
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)
