"""The plain collective: what it carries, and who is named when a rank dies."""

import pytest

from expertmesh.bench.exchange import assembled
from expertmesh.errors import RankFailure
from expertmesh.launch.launcher import Here
from expertmesh.mesh.topology import Topology

pytestmark = pytest.mark.timeout(120)


def test_a_rank_that_dies_is_named_and_not_who_has_seen_it() -> None:
    """The others lose their connections to it before the driver knows of its death."""
    specs = [{"rank": rank, "ranks": 3} for rank in range(3)]
    program = "tests.bench.programs:serve_rank"
    with assembled(Here(["torch"]), program, specs, Topology(1, 3), 60.0) as crew:
        assert crew.ask([{"do": "exchange"}] * 3) == [[[rank] * 3] * 3 for rank in range(3)]
        with pytest.raises(RankFailure, match=r"rank 1 .* died in step 7: it exited with status 5"):
            crew.ask([{"do": "leave" if rank == 1 else "exchange"} for rank in range(3)], "step 7")
