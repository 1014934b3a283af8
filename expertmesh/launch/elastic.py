"""The same line on every machine: each starts its ranks with torch's elastic launcher, when all machines are there."""

import logging
import math
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from expertmesh.errors import RankFailure
from expertmesh.launch.rollcall import Rendezvous, Roll

GRACE = 10  # seconds that ranks have to end in when the launcher is told to


def start(
    where: Rendezvous, nodes: int, cards: int, timeout: float, interface: str | None, words: Sequence[str]
) -> int:
    """Run `python -m expertmesh` with these words as every rank of this machine, and return the exit code: of the ranks
    0, 1 where one failed, 2 where one refused its input; 128 + N after signal N.

    timeout: seconds in which all machines have to be there. RankFailure, InputError: see `Rendezvous.call`.
    """
    roll = where.call(nodes, cards, timeout, interface)
    # What the launcher has to say of ranks that fail, these say better.
    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=cards,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        run_id=roll.run,
        # All are there, and have their numbers. This backend asks nobody any more while ranks run, so that a launcher
        # whose link is cut does not hang.
        rdzv_backend="static",
        rdzv_endpoint=str(where),
        rdzv_configs={"rank": roll.number, "timeout": math.ceil(timeout)},
        max_restarts=0,
        local_addr=roll.machines[roll.number].address,
        shutdown_timeout=GRACE,
    )
    # "$" means something to the launcher.
    command = ["-m", "expertmesh", *(word.replace("$", "$$") for word in words)]
    return _launch(config, command, roll)


def _launch(config: LaunchConfig, command: Sequence[str], roll: Roll) -> int:
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code == 2 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except RuntimeError as error:  # of the store
        raise RankFailure(
            f"torch's launcher failed on {roll.machines[roll.number]}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the launcher's handlers raise
            signal.signal(number, signal.SIG_DFL)
    return 0
