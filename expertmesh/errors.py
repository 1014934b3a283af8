"""What the engine raises on purpose: for input that cannot be used, for a rank or a kernel that has failed."""


class InputError(ValueError):
    """What was given cannot be used: a folder, a file, a setting, a prompt.

    The message is one sentence or a short list: what was wrong, and what to do. The command line prints it and
    exits with 2; the server answers 400.
    """


class RankFailure(RuntimeError):
    """A rank of the cluster has failed or died; the message names it, its host, the step and the cause. The engine
    has ended: nothing more can be computed with it."""


class KernelFailure(RuntimeError):
    """A kernel of an accelerator cannot be made or run: its compiler refuses it, its tiles do not fit on the chip, or a
    tool is missing. The message names the kernel, the target and the reason."""

    def __init__(self, kernel: str, target: str, reason: str) -> None:
        super().__init__(f"kernel {kernel} on {target}: {reason}")
