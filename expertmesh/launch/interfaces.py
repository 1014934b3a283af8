"""Network interfaces of this machine."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from expertmesh.errors import InputError


def interfaces() -> dict[str, str]:
    """Interfaces that are up, and their IPv4 address."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: str(address.address)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for address in reversed(addresses)
        if address.family == socket.AF_INET
    }


def interface_address(name: str) -> str:
    """The IPv4 address of an interface. InputError where it has none."""
    known = interfaces()
    if name not in known:
        listed = ", ".join(f"{n} ({a})" for n, a in known.items()) or "none"
        raise InputError(f"there is no interface {name} with an IPv4 address here; there are {listed}")
    return known[name]


def interface_of(address: str) -> str:
    """The interface that has this address, be it its second one. InputError where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            return name
    raise InputError(f"{address} is no address of this machine")


def is_own(address: str) -> bool:
    """Is it an address of this machine?"""
    return is_loopback(address) or any(
        own.address == address for addresses in psutil.net_if_addrs().values() for own in addresses
    )


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def use_for_gloo(address: str) -> None:
    """gloo picks an interface by host name otherwise, and can take minutes with the wrong one."""
    name = "lo" if is_loopback(address) else interface_of(address)
    os.environ["GLOO_SOCKET_IFNAME"] = name


@dataclass(frozen=True)
class Counters:
    """What an interface has sent so far."""

    bytes: int
    packets: int

    @staticmethod
    def of(interface: str) -> "Counters":
        """Of this process's network namespace (files under /sys may show another one's)."""
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == interface:
                fields = numbers.split()
                return Counters(int(fields[8]), int(fields[9]))
        raise InputError(f"there is no interface {interface} here")

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(self.bytes - other.bytes, self.packets - other.packets)

    @property
    def payload(self) -> int:
        """Without the headers of Ethernet (14 bytes), IPv4 (20) and TCP with timestamps (32)."""
        return self.bytes - 66 * self.packets
