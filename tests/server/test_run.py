"""The server as processes: what it says, and how it ends, in whatever way."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from expertmesh import LLM, InputError
from expertmesh.server.run import check_tls, listen
from tests.support.emulation import Said

# A step takes at least 100 ms, so that a long answer does not end by itself while something happens to the server; each
# tensor takes 50 ms to load where the first word says so.
PROGRAM = """
import sys, time
from expertmesh import cli
from expertmesh.engine import checkpoint, engine
_, slow, *words = sys.argv
advance, load = engine.Engine.advance, checkpoint._load_one
engine.Engine.advance = lambda self: time.sleep(0.1) or advance(self)
if slow == "slow":
    checkpoint._load_one = lambda *given: time.sleep(0.05) or load(*given)
sys.exit(cli.main(["serve", *words]))
"""
BOUND = 60.0  # seconds after which something that must happen has not
LONG = {"model": "tiny", "prompt": "a", "ignore_eos": True, "max_tokens": 500, "stream": True}
PROCESSES = ["--cards", "2", "--ranks", "processes"]


class Served:
    """A server of a model, as processes."""

    def __init__(self, folder: Path, *words: str, slow: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-W", "error", "-c", PROGRAM, "slow" if slow else "", str(folder)]
        more = ["--name", "tiny", "--port", str(port), "--max-context", "512", *words]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*command, *more], stdout=pipe, stderr=pipe, text=True)
        self.said = Said(self.process.stderr)
        self.url = f"http://127.0.0.1:{port}"
        self.all: list[psutil.Process] = []

    def ready(self) -> None:
        self.said.wait_for("serving tiny at ")
        self.look()

    def look(self) -> None:
        """Remember all processes that there are."""
        own = psutil.Process(self.process.pid)
        self.all = [own, *own.children(recursive=True)]

    @property
    def front(self) -> psutil.Process:
        (found,) = [each for each in self.all if "expertmesh.server.front" in each.cmdline()]
        return found

    def ends(self) -> int:
        """Its exit code, when none of its processes is there any more."""
        code = self.process.wait(BOUND)
        assert psutil.wait_procs(self.all, BOUND)[1] == []
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.said.all()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def post(self, **fields: Any) -> httpx.Response:
        """What is answered to a request that is not like the long one in these fields."""
        headers = fields.pop("headers", {})
        return httpx.post(f"{self.url}/v1/completions", json=LONG | fields, headers=headers, timeout=BOUND)

    def wait_for(self, status: int, path: str) -> dict[str, Any]:
        """What is answered there, as soon as it has this status."""
        end = time.monotonic() + BOUND
        while time.monotonic() < end:
            try:
                answer = httpx.get(self.url + path, timeout=BOUND)
            except httpx.TransportError:
                continue
            if answer.status_code == status:
                return dict(answer.json())
            time.sleep(0.01)
        raise AssertionError(f"{path} does not answer with {status}")


class Streaming:
    """A client that reads a stream in a thread."""

    def __init__(self, server: Served, **fields: Any) -> None:
        self.events: list[Any] = []
        self.broken: httpx.TransportError | None = None
        self._thread = threading.Thread(
            target=self._read, args=(f"{server.url}/v1/completions", LONG | fields)
        )
        self._thread.start()
        end = time.monotonic() + BOUND
        while not self.events:
            assert time.monotonic() < end and self._thread.is_alive()
            time.sleep(0.005)

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url, json=body, timeout=BOUND) as answer:
                for line in filter(None, answer.iter_lines()):
                    data = line.removeprefix("data: ")
                    self.events.append(data if data == "[DONE]" else json.loads(data))
        except httpx.TransportError as error:
            self.broken = error

    def last(self) -> Any:
        self._thread.join(BOUND)
        assert not self._thread.is_alive() and self.broken is None, self.broken
        return self.events[-1]

    def error(self) -> str:
        return str(self.last()["error"]["message"])


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*words: str, slow: bool = False) -> Served:
        started.append(Served(folder, *words, slow=slow))
        return started[-1]

    yield start
    for server in started:  # where a test has not ended it
        for process in server.all:
            if process.is_running():
                process.kill()
        server.close()


def test_sigterm_under_load(serve: Callable[..., Served], folder: Path) -> None:
    """Answers are those of the library; what ends in time ends well, and nothing new is taken."""
    server = serve("--grace", "8")
    server.ready()
    assert server.said.lines[-1].split() == ["serving", "tiny", "at", f"{server.url}/v1"]
    assert [line.split()[0] for line in server.said.lines[:-1]] == [
        *("model", "precision", "layout", "experts", "kernels", "memory", "requests", "address")
    ]
    body = {
        "prompt": "春",
        "temperature": 0,
        "logprobs": 1,
        "max_tokens": 9,
        "ignore_eos": False,
        "stream": False,
    }
    (choice,) = server.post(**body).json()["choices"]
    library = LLM(folder)
    (expected,) = library.generate("春", library.default_params(temperature=0.0, logprobs=1, max_tokens=9))
    values = [one[token] for token, one in zip(expected.token_ids, expected.logprobs or (), strict=True)]
    assert choice["text"] == expected.text and choice["logprobs"]["token_logprobs"] == values
    long, short = Streaming(server), Streaming(server, max_tokens=3)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for(503, "/ready")["status"] == "draining"
    late = server.post()
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert late.headers["connection"] == "close"
    assert short.last() == "[DONE]"
    assert "the 8 s are over that requests had to end in" in long.error()
    assert server.ends() == 0


def test_a_page_that_looks_on_does_not_hold_up_the_end(serve: Callable[..., Served]) -> None:
    server = serve("--grace", "600")
    server.ready()
    with httpx.stream("GET", f"{server.url}/dashboard/events", timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: hello"
        server.process.send_signal(signal.SIGTERM)
        assert [*lines][-1] == ""
    assert server.ends() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(
    serve: Callable[..., Served], number: signal.Signals, code: int
) -> None:
    server = serve("--grace", "600", *(PROCESSES if number == signal.SIGINT else ()))
    server.ready()
    stream = Streaming(server)
    server.process.send_signal(number)
    server.wait_for(503, "/ready")
    server.process.send_signal(number)
    assert server.ends() == code
    stream._thread.join(BOUND)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading(serve: Callable[..., Served], number: signal.Signals) -> None:
    server = serve(slow=True)
    assert server.wait_for(503, "/ready")["status"] == "loading"
    while not server.wait_for(503, "/ready")["fraction"]:
        time.sleep(0.01)
    refused = server.post()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["code"] == "loading"
    server.look()
    server.process.send_signal(number)
    assert server.ends() == 0


def test_the_http_process_is_killed_while_loading(serve: Callable[..., Served]) -> None:
    server = serve(slow=True)
    while not server.wait_for(503, "/ready")["fraction"]:
        time.sleep(0.01)
    server.look()
    server.front.kill()
    assert server.ends() == 1
    assert "HTTP has ended (killed by signal 9)" in server.said.all()[-1]


def test_the_http_process_is_killed_under_load(serve: Callable[..., Served]) -> None:
    server = serve(*PROCESSES)
    server.ready()
    stream = Streaming(server)
    server.front.kill()
    assert server.ends() == 1
    assert "HTTP has ended (killed by signal 9)" in server.said.all()[-1]
    stream._thread.join(BOUND)
    assert stream.broken is not None


def test_the_engine_is_killed_under_load(serve: Callable[..., Served]) -> None:
    server = serve(*PROCESSES)
    server.ready()
    stream = Streaming(server)
    with httpx.Client(timeout=BOUND) as client:
        assert client.get(f"{server.url}/health").status_code == 200
        server.process.kill()
        assert "the process of the engine has ended" in stream.error()
        health = client.get(f"{server.url}/health")
    assert health.status_code == 503
    assert "the process of the engine has ended" in health.json()["error"]["message"]
    assert server.ends() == -signal.SIGKILL


def test_a_rank_is_killed_under_load(serve: Callable[..., Served]) -> None:
    """All that are waiting hear which it was; the server stays to say it, and then ends for who starts it again."""
    server = serve(*PROCESSES, "--linger", "3")
    server.ready()
    streams = [Streaming(server) for _ in range(3)]
    others = (server.process.pid, server.front.pid)
    ranks = sorted(each.pid for each in server.all if each.pid not in others)
    os.kill(ranks[-1], signal.SIGKILL)
    host = socket.gethostname()
    for stream in streams:
        assert f"rank 1 (node 0, card 1) on {host} died in step " in stream.error()
    health = server.wait_for(503, "/health")
    assert {name: health[name] for name in ("status", "rank", "node", "card", "host")} == {
        "status": "failed", "rank": 1, "node": 0, "card": 1, "host": host,
    }  # fmt: skip
    assert "SIGKILL" in health["error"]["message"] and health["since"]
    assert server.wait_for(200, "/live") == {"status": "ok"}
    refused = server.post()
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "engine_stopped")
    assert server.ends() == 1


def test_a_rank_that_is_stopped_is_named_before_it_has_failed(serve: Callable[..., Served]) -> None:
    """While nobody asks for anything."""
    server = serve(*PROCESSES)
    server.ready()
    others = (server.process.pid, server.front.pid)
    rank = max(each.pid for each in server.all if each.pid not in others)
    os.kill(rank, signal.SIGSTOP)
    health = server.wait_for(503, "/health")
    assert (health["status"], health["rank"]) == ("late", 1)
    assert {one["rank"] for one in health["ranks"]} <= {0, 1}, "the other one may wait for it"
    os.kill(rank, signal.SIGCONT)
    server.wait_for(200, "/health")
    server.process.send_signal(signal.SIGINT)
    assert server.ends() == 0


def test_keys_and_limits_reach_the_http_process(serve: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the team\none\n\ntwo\n")
    given = ["--api-key-file", str(tmp_path / "keys"), "--max-body", "1000", "--max-queue", "0"]
    server = serve(*given, "--max-batch-requests", "1", "--host", "0.0.0.0")
    server.ready()
    assert "one" not in " ".join(server.front.cmdline())
    assert not any("no --api-key" in line for line in server.said.lines)
    url, key = f"{server.url}/v1/completions", {"Authorization": "Bearer two"}
    assert server.post().status_code == 401
    assert server.post(prompt="a" * 1000, headers=key).status_code == 413
    with httpx.stream("POST", url, json=LONG, headers=key, timeout=BOUND) as first:
        lines = first.iter_lines()  # whose end would be the connection's
        next(lines)
        full = server.post(headers=key)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    while server.post(max_tokens=1, headers=key).status_code == 429:
        time.sleep(0.01)  # until it is known that the first has gone
    server.process.send_signal(signal.SIGINT)
    assert server.ends() == 0


def test_a_model_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file.name).symlink_to(file)
    server = Served(tmp_path, slow=True)
    assert server.ends() == 2
    (line,) = server.said.all()
    assert "has no tokenizer.json, so it cannot be served" in line
    server.close()


def test_a_port_in_use_is_told_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "0 to 65535"),
        ("no.such.host.invalid", 0, "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_listened_on(host: str, port: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        listen(host, port)


def test_certificates_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("not one")
    here = str(tmp_path / "a")
    check_tls(None, None)
    for cert, key, words in (
        (here, None, "go together"),
        (None, here, "go together"),
        (here, here, "not a certificate and its private key"),
        (here, "nowhere", "--tls-key nowhere: No such file"),
    ):
        with pytest.raises(InputError, match=words):
            check_tls(cert, key)
