"""Ranks of the benchmarks as processes: they tell where they stand, and are found where they wait in vain."""

import json
import os
import signal
from dataclasses import asdict
from typing import Any

import pytest

from expertmesh.bench import exchange, transport
from expertmesh.bench.exchange import assembled
from expertmesh.bench.workload import Workload
from expertmesh.cli import main
from expertmesh.errors import RankFailure
from expertmesh.launch.launcher import Here
from expertmesh.mesh.topology import Topology

SMALL = Workload(nodes=1, cards=2, tokens=2, hidden=16)


@pytest.mark.parametrize(
    ("module", "spec", "what"),
    [
        (exchange, {"workload": asdict(SMALL)}, {"name": "flat"}),
        (transport, {"ranks": 2}, {"kind": "copied", "size": 4096}),
    ],
    ids=["exchange", "transport"],
)
def test_a_rank_that_waits_in_vain_is_found(
    module: Any, spec: dict[str, Any], what: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    specs = [spec | {"rank": rank} for rank in range(2)]
    with assembled(Here(module.PRELOAD), module.PROGRAM, specs, Topology(1, 2, 1), 5.0) as crew:
        os.kill(crew.members[0].pid, signal.SIGUSR1)
        with pytest.raises(
            RankFailure, match=r"rank 0 \(.* has got nothing of rank 1 \(.*: the link between"
        ):
            crew.ask([{"do": "measure"} | what, {"do": "place"}], "a measurement")
    said = capfd.readouterr().err
    assert f"rank 0 (node 0, card 0) on {crew.members[0].host}, process {crew.members[0].pid}, " in said


def test_transport(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SIZES", (4096, 1 << 16))
    assert main(["bench", "transport", "--ranks", "3", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {size: list(kinds) for size, kinds in report["seconds"].items()} == {
        size: ["in place", "copied", "gloo"] for size in ("4096", "65536")
    }


def test_transport_without_the_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "free_memory", lambda: 10**9)
    monkeypatch.setattr(transport, "Here", None)  # nothing is started
    assert main(["bench", "transport", "--ranks", "16"]) == 2
    assert "16 ranks need about 4.3 GB, and 1.0 GB are free here" in capsys.readouterr().err
