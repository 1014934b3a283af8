"""A server that is started, used and ended, and one that cannot start."""

import urllib.request
from pathlib import Path

import pytest

from expertmesh import InputError
from expertmesh.bench.started import started


def test_it_listens_until_the_end_of_the_block(tiny_folder: Path) -> None:
    with started([str(tiny_folder), "--name", "a", "--name", "b"]) as server:
        assert server.name == "a"
        with urllib.request.urlopen(f"{server.url}/models") as answer:
            assert answer.status == 200
    assert server.process.returncode == 0


def test_what_it_says_is_told_where_it_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"the server did not start:\nexpertmesh: .*config.json"),
        started([str(tmp_path)]),
    ):
        pass
