"""What the engine raises on purpose: for input that cannot be used, and for a rank that has failed."""


class InputError(ValueError):
    """What was given cannot be used: a folder, a file, a setting, a prompt.

    The message is one sentence or a short list: what was wrong, and what to do. The command line prints it and
    exits with 2; the server answers 400.
    """


class RankFailure(RuntimeError):
    """A rank of the cluster has failed or died; the message names it, its host, the step and the cause. The engine
    has ended: nothing more can be computed with it."""
