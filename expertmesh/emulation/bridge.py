"""The network of an emulated cluster as the kernel can make it: a bridge in a namespace of its own."""

import os
from collections.abc import Sequence

from expertmesh.emulation.links import MTU, delayed, shaped
from expertmesh.emulation.namespaces import configure, create, inside
from expertmesh.errors import InputError

# The bridge neither learns nor floods. What is for a machine that is cut off reaches no other one.
PORT = "type bridge_slave learning off flood off mcast_flood off"


class Bridge:
    """Gives each namespace an `eth0`, the end of a link to one bridge, which forwards frames by their address.

    What goes to a machine keeps to the rate (bits/s, 0 for none) and delay (seconds, 0 for none); what comes from it
    its own end has to slow down.
    """

    def __init__(
        self, namespaces: Sequence[int], addresses: Sequence[str], rate: int = 0, delay: float = 0.0
    ) -> None:
        self._namespace = create()
        try:
            inside(self._namespace, lambda: _build(namespaces, addresses, rate, delay))
        except BaseException:
            self.close()
            raise

    def cut(self, number: int) -> None:
        """Drop what a machine sends and what is on its way to it. Its link stays up."""
        port = f"node{number}"

        def sever() -> None:
            configure("ip", [f"link set {port} nomaster"])
            # Another queue, for what is in the one that it has would still come out.
            configure("tc", [f"qdisc replace dev {port} root pfifo"])

        inside(self._namespace, sever)

    def close(self) -> None:
        os.close(self._namespace)


def can_delay() -> bool:
    """Does the kernel have the queue that delays?"""
    namespace = create()
    try:
        inside(namespace, lambda: configure("tc", [delayed("lo", 1e-3)]))
    except InputError:
        return False
    finally:
        os.close(namespace)
    return True


def _build(namespaces: Sequence[int], addresses: Sequence[str], rate: int, delay: float) -> None:
    ports = {f"node{number}": number for number in range(len(namespaces))}
    links = [f"link add bridge mtu {MTU} type bridge stp_state 0 mcast_snooping 0", "link set bridge up"]
    for port, number in ports.items():
        end = f"eth0 address {addresses[number]} mtu {MTU} netns /proc/{os.getpid()}/fd/{namespaces[number]}"
        links += [
            f"link add {port} mtu {MTU} type veth peer name {end}",
            f"link set {port} master bridge up",
            f"link set {port} {PORT}",
        ]
    configure("ip", links)
    configure("bridge", [f"fdb add {addresses[n]} dev {port} master static" for port, n in ports.items()])
    queues = [delayed(port, delay) for port in ports if delay]
    queues += [shaped(port, rate, "parent 1:1" if delay else "root") for port in ports if rate]
    configure("tc", queues)
