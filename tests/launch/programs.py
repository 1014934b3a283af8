"""What the processes in these tests run."""

import os
import signal
import sys
import time
from typing import Any

from expertmesh.launch.channel import Channel, ChannelClosed


def echo(spec: dict[str, Any], channel: Channel) -> None:
    """Answers each message with [its name, the message], until the channel ends."""
    try:
        while True:
            channel.send([spec.get("name"), channel.receive()])
    except ChannelClosed:
        pass


def end(spec: dict[str, Any], _: Channel) -> None:
    """Ends in the way that is asked for."""
    if "raise" in spec:
        raise RuntimeError(spec["raise"])
    if "exit" in spec:
        sys.exit(spec["exit"])
    if "signal" in spec:
        os.kill(os.getpid(), spec["signal"])
    print("on the way", end="")


def size(spec: dict[str, Any], channel: Channel) -> None:
    channel.send(len(spec["data"]))


def circumstances(spec: dict[str, Any], channel: Channel) -> None:
    """What it finds itself in."""
    channel.send(
        {
            "descriptors": {int(name): _target(name) for name in os.listdir("/proc/self/fd")},
            "channel": channel.fileno(),
            "session": os.getsid(0),
            "parent": os.getppid(),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "default": [
                signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGCHLD)
            ],
            "environment": {name: os.environ.get(name) for name in spec.get("names", ())},
            "modules": [name in sys.modules for name in spec.get("modules", ())],
        }
    )


def multiply(spec: dict[str, Any], channel: Channel) -> None:
    """An operation that takes several threads of OpenMP, and then some more of them."""
    import torch

    torch.set_num_threads(spec["threads"])
    a = torch.full((512, 512), 0.25)
    for _ in range(5):
        total = (a @ a).exp().sum().log().item()
    channel.send([total, torch.get_num_threads()])


class Witness(RuntimeError):
    """What a rank says that has seen another one fail."""

    def __init__(self, problem: str, suspects: list[int]) -> None:
        super().__init__(problem)
        self.suspects = suspects


def obey(spec: dict[str, Any], channel: Channel) -> None:
    """A rank that does its duty, and ends or fails as it is told."""
    from expertmesh.launch.duty import Duty

    duty = Duty(spec, channel)
    duty.where = lambda: spec.get("waits")

    def do(message: dict[str, Any]) -> Any:
        time.sleep(message.get("after", 0.0))
        while "until" in message and not os.path.exists(message["until"]):
            time.sleep(0.01)
        match message["do"]:
            case "echo":
                return [spec["name"], message["word"]]
            case "raise":
                raise ValueError(message["word"])
            case "witness":
                raise Witness(message["word"], message["suspects"])
            case "exit":
                os._exit(message["status"])
            case "half":
                os.write(channel.fileno(), b"\0\0\1\0half a message")
                os.kill(os.getpid(), message["end"])
            case "nonsense":
                channel.send(message["word"])
            case "unsayable":
                return object()
        return None

    duty.serve(do)


def _target(name: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:  # the one that lists them
        return None
