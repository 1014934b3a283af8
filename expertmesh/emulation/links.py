"""Links between emulated machines: how a rate and a delay are written, and the queues that keep to them."""

import math
import re

from expertmesh.errors import InputError

MTU = 9000  # bytes; small packets and small bursts together would not reach a high rate
QUEUE = 64_000_000  # bytes that wait for a link. What is lost is sent again, and would count twice
LOWEST, HIGHEST = 1_000, 100_000_000_000  # bits/s
LONGEST = 10.0  # seconds
BITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def parse_rate(text: str) -> int:
    """Bits/s of "50mbit", "1gbit", "200kbit" or "9600bit"; a number alone is bits/s too. InputError: it is none."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)(?:([kmg]?)bit)?", text.strip().lower())
    if not found:
        raise InputError(f"--link {text!r}: not a rate like 50mbit, 1gbit or 200kbit")
    rate = round(float(found[1]) * BITS[found[2] or ""])
    if not LOWEST <= rate <= HIGHEST:
        raise InputError(f"--link {text!r}: must be from 1kbit to 100gbit")
    return rate


def parse_delay(text: str) -> float:
    """Seconds of "0.2ms", "200us" or "1s". InputError: it is none, or too long."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|ms|us)", text.strip().lower())
    if not found:
        raise InputError(f"--delay {text!r}: not a time like 0.2ms, 200us or 1s")
    delay = float(found[1]) * SECONDS[found[2]]
    if delay > LONGEST:
        raise InputError(f"--delay {text!r}: must be at most {LONGEST:g}s")
    return delay


def burst(rate: int) -> int:
    """Bytes that may pass at once after a pause.

    Few, or small messages would not be slowed down at all; but at high rates many, or the timers of the kernel, which
    are late now and then, would leave the link idle. A packet must fit.
    """
    return max(10_240, round(16_384 * math.sqrt(rate / 50e6)))


def shaped(device: str, rate: int, parent: str = "root") -> str:
    """The command to tc by which a device sends no faster than this rate, in bits/s."""
    return f"qdisc add dev {device} {parent} tbf rate {rate}bit burst {burst(rate)} limit {QUEUE}"


def delayed(device: str, delay: float, handle: str = "1:") -> str:
    """The command to tc by which a device sends each packet so many seconds later."""
    return f"qdisc add dev {device} root handle {handle} netem delay {delay * 1e6:.0f}us limit 1000000"
