"""How many files a process may have open: a connection to every rank is one, and there may be hundreds."""

import os
import resource

from expertmesh.errors import InputError

SPARE = 32  # besides those for ranks


def allow_files(count: int) -> None:
    """Let this process, and those that it will start, open so many files more, and a few besides. InputError where
    they may not. The limit is raised where that is needed only: above 1024 select() cannot be used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + SPARE
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if needed > hard != resource.RLIM_INFINITY:
        raise InputError(
            f"{needed} files have to be open at once for so many ranks, and this process may open {hard}: raise the "
            f"limit (ulimit -n {needed}, or in the settings of the container or service), or take fewer ranks"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
