"""Rates and delays of emulated links as they are written, and the queues made of them."""

import pytest

from expertmesh.emulation.links import MTU, burst, delayed, parse_delay, parse_rate, shaped
from expertmesh.errors import InputError


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("50mbit", 50_000_000), ("1gbit", 10**9), ("200kbit", 200_000), ("1.5Gbit", 1_500_000_000),
        ("9600bit", 9600), ("9600", 9600), ("100gbit", 10**11), (" 1kbit ", 1000),
    ],
)  # fmt: skip
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text, "not a rate like 50mbit, 1gbit or 200kbit")
        for text in ("", "fast", "50m", "50mbps", "-1mbit", "1e9", "nan", "9" * 400)
    ]
    + [(t, "must be from 1kbit to 100gbit") for t in ("0", "999", "101gbit")],
)  # fmt: skip
def test_what_is_no_rate(text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^--link '{text}': {message}$"):
        parse_rate(text)


def test_delays() -> None:
    assert [parse_delay(t) for t in ("0.2ms", "200us", "1s", "0ms", "2MS")] == pytest.approx(
        [0.0002, 0.0002, 1.0, 0.0, 0.002]
    )


@pytest.mark.parametrize("text", ["", "1", "0.2", "ms", "-1ms", "1 min", "1e3us"])
def test_what_is_no_delay(text: str) -> None:
    with pytest.raises(InputError, match=rf"^--delay '{text}': not a time like 0.2ms, 200us or 1s$"):
        parse_delay(text)


def test_a_delay_that_is_too_long() -> None:
    with pytest.raises(InputError, match="must be at most 10s"):
        parse_delay("10001ms")


def test_bursts() -> None:
    """Those at which a link is as fast as it should be, as measured; and a packet fits always."""
    measured = {50_000_000: 16, 200_000_000: 32, 1_000_000_000: 64}
    assert [burst(rate) / 1024 for rate in measured] == pytest.approx(list(measured.values()), rel=0.15)
    assert min(burst(rate) for rate in (1000, 10**6, 10**7)) > MTU + 14


def test_commands() -> None:
    assert (
        shaped("eth0", 50_000_000)
        == "qdisc add dev eth0 root tbf rate 50000000bit burst 16384 limit 64000000"
    )
    assert delayed("node1", 0.0002) == "qdisc add dev node1 root handle 1: netem delay 200us limit 1000000"
    assert shaped("node1", 10**9, "parent 1:1").startswith(
        "qdisc add dev node1 parent 1:1 tbf rate 1000000000bit"
    )
