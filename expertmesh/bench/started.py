"""A server of this engine, started as users start it: `expertmesh serve` in a process of its own."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from expertmesh.errors import InputError

READY = re.compile(r"serving (.+) at (http\S+)")
END = 60.0  # seconds that it has to end in


@dataclass(frozen=True)
class Started:
    """A server that listens. said: the lines of its standard error, which grow."""

    process: subprocess.Popen[str]
    name: str
    url: str
    said: list[str] = field(default_factory=list)


@contextmanager
def started(words: Sequence[str], echo: bool = False) -> Iterator[Started]:
    """Run `expertmesh serve` with these words at a free port; at the end it is stopped and waited for. echo: say its
    lines before it listens. InputError with what it said where it does not come to listen."""
    command = [sys.executable, "-m", "expertmesh", "serve", *words, "--port", "0"]
    silent, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=silent, stdout=silent, stderr=pipe, text=True) as process:
        try:
            yield _ready(process, echo)
        finally:
            _stop(process)


def _ready(process: subprocess.Popen[str], echo: bool) -> Started:
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line.rstrip("\n"))
        if found := READY.search(line):
            server = Started(process, found[1], found[2], said)
            # What it says later must be read, or it would wait for its reader.
            threading.Thread(target=_listen, args=(server,), daemon=True).start()
            return server
        if echo:
            print(line, end="", file=sys.stderr)
    raise InputError("the server did not start:\n" + "\n".join(said[-20:]))


def _listen(server: Started) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.said.append(line.rstrip("\n"))


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END)
    except subprocess.TimeoutExpired:
        process.kill()
