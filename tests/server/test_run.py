"""The server as a process: its one line, its port, its end."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from expertmesh import LLM, InputError
from expertmesh.server.run import check_port, serve

# A step takes at least 10 ms, so that a long answer does not end by itself while the server is told to stop.
PROGRAM = """
import sys, time
from expertmesh import LLM
from expertmesh.server import run
run.GRACE = 0.1
llm = LLM(sys.argv[1], cache_tokens=512)
step = llm.engine.ranks.run
llm.engine.ranks.run = lambda *work: time.sleep(0.01) or step(*work)
run.serve(llm, "tiny", sys.argv[2], 0)
print("after", llm.engine.busy)
"""
BODY = {"model": "tiny", "prompt": "a", "ignore_eos": True}


@contextmanager
def process(folder: Path, host: str = "127.0.0.1") -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server as a process, its first line, and its URL."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), host]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as found:
        assert found.stderr is not None
        line = found.stderr.readline()
        assert line.startswith("serving tiny at http://"), line + found.stderr.read()
        try:
            yield found, line, line.split()[-1]
        finally:
            found.kill()  # where a test has not ended it


def test_sigint_ends_it_with_success(folder: Path) -> None:
    host = "::1"
    try:
        check_port(host, 0)
    except InputError:  # a machine without IPv6
        host = "127.0.0.1"
    with process(folder, host) as (server, line, url):
        assert line.startswith("serving tiny at http://[::1]:") or host != "::1"
        answer = httpx.post(f"{url}/completions", json=BODY | {"max_tokens": 2}).json()
        assert answer["usage"]["completion_tokens"] == 2
        server.send_signal(signal.SIGINT)
        out, err = server.communicate()
    assert (server.returncode, out, err) == (0, "after False\n", "")


def test_sigterm_ends_it_with_success_and_answers_with_an_error(folder: Path) -> None:
    with process(folder) as (server, _, url):
        body = BODY | {"max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith('data: {"id"')
            server.send_signal(signal.SIGTERM)
            *_, last = filter(None, lines)
        out, err = server.communicate()
    assert "stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert (server.returncode, out, err) == (0, "after False\n", "")


def test_a_port_in_use_is_told_in_one_sentence(llm: LLM) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use"):
            check_port("127.0.0.1", port)
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use"):
            serve(llm, "tiny", "127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "0 to 65535"),
        ("no.such.host.invalid", 0, "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_listened_on(host: str, port: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_port(host, port)
