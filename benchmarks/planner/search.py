"""CPU time of full searches: every layout of 64 cards, with a limit on TPOT and for the whole front."""

import argparse
import json
import time

from expertmesh.commands.plan_search import FRONT_MS
from expertmesh.planner.cards import card
from expertmesh.planner.models import model
from expertmesh.planner.plans import Limits, front
from expertmesh.planner.search import Search, search
from expertmesh.planner.serving import Workload
from expertmesh.planner.space import Cluster, Space

WORK = Workload(3500, 1500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", default="ascend-910b,h800,h20", help="names, with commas between")
    parser.add_argument("--nodes", type=int, default=8)
    for name in parser.parse_args().cards.split(","):
        print(json.dumps({"card": name} | timed(name, parser.parse_args().nodes)))


def timed(name: str, nodes: int) -> dict[str, float]:
    """Seconds of one core, and layouts that are in the space."""
    space = Space(Cluster(card(name), nodes, 8), model("deepseek-v3"))
    layouts = sum(
        1 for size in space.cluster.sizes() for tp in space.tps(size) for _ in space.layouts(size, tp)
    )
    start = time.process_time()
    best = search(space, WORK, Limits(0.05))
    limit = time.process_time()
    points = front(Search(space, WORK, [*(ms / 1e3 for ms in FRONT_MS), float("inf")]).plans())
    return {
        "layouts": layouts,
        "limit_s": round(limit - start, 2),
        "front_s": round(time.process_time() - limit, 2),
        "best_tokens_per_card": round(best[0].tokens_per_card, 1),
        "front_points": len(points),
    }


if __name__ == "__main__":
    main()
