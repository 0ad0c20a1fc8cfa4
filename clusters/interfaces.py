"""The network interfaces of this node, and which of them other nodes can be expected to reach. Linux; no packages."""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from meshwright.clusters.network import interfaces

__all__ = ["HOST_LOCAL", "Interface", "candidates", "read_interfaces"]

_NET = Path("/sys/class/net")
_GET_FLAGS = 0x8913
_UP, _LOOPBACK, _RUNNING = 0x1, 0x8, 0x40
HOST_LOCAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "lxc", "podman", "tunl", "kube-")
"""How names of interfaces begin that reach this host only."""


@dataclass(frozen=True)
class Interface:
    """One network interface.

    Args:
        name: such as "eth0".
        address: its IPv4 address, None where it has none.
        up: whether it is switched on and has a carrier.
        loopback: whether it reaches this node only.
        bytes_per_s: speed in one direction; None where the kernel does not know one.
        wired: whether it is a device rather than a bridge or a tunnel.
    """

    name: str
    address: str | None
    up: bool
    loopback: bool = False
    bytes_per_s: float | None = None
    wired: bool = False

    @property
    def public(self) -> bool:
        """Whether its address can be reached from the internet.

        >>> Interface("eth0", "10.0.0.1", True).public, Interface("eth0", "9.9.9.9", True).public
        (False, True)
        """
        return self.address is not None and ipaddress.ip_address(self.address).is_global


def read_interfaces() -> tuple[Interface, ...]:
    """All interfaces of this node.

    >>> any(each.loopback for each in read_interfaces())
    True
    """
    addresses = interfaces()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return tuple(_interface(name, addresses.get(name), _flags(probe, name)) for _, name in socket.if_nameindex())


def _interface(name: str, address: str | None, flags: int) -> Interface:
    return Interface(
        name=name,
        address=address,
        up=bool(flags & _UP and flags & _RUNNING),
        loopback=bool(flags & _LOOPBACK),
        bytes_per_s=_ethernet_bytes_per_s(_NET / name) or _infiniband_bytes_per_s(_NET / name),
        wired=(_NET / name / "device").exists(),
    )


def _flags(probe: socket.socket, name: str) -> int:
    try:
        told = fcntl.ioctl(probe.fileno(), _GET_FLAGS, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return 0
    return int(struct.unpack_from("H", told, 16)[0])


def _ethernet_bytes_per_s(home: Path) -> float | None:
    """The kernel writes megabits; -1 or an error where it does not know."""
    with suppress(OSError, ValueError):
        megabits = int((home / "speed").read_text())
        return megabits * 1e6 / 8 if megabits > 0 else None
    return None


def _infiniband_bytes_per_s(home: Path) -> float | None:
    """Of the InfiniBand device behind an interface, whose rate reads like "400 Gb/sec (4X NDR)"."""
    with suppress(OSError, ValueError):
        rates = [path.read_text().split()[0] for path in (home / "device/infiniband").glob("*/ports/*/rate")]
        return max(map(float, rates)) * 1e9 / 8 if rates else None
    return None


def candidates(interfaces: Iterable[Interface], asked: str = "auto") -> tuple[Interface, ...]:
    """The interfaces through which nodes may meet, the likeliest first.

    Bridges of containers and virtual machines have the same address on every host and reach only that host, so they
    are not tried unless asked for by name. Loopback comes last: it serves nodes that are pretended on one machine.

    Args:
        interfaces: of one node.
        asked: "auto", or the name of one.

    >>> lo, docker = Interface("lo", "127.0.0.1", True, loopback=True), Interface("docker0", "172.17.0.1", True)
    >>> [each.name for each in candidates([lo, docker, Interface("eth0", "10.0.0.1", True)])]
    ['eth0', 'lo']
    """
    usable = [each for each in interfaces if each.up and each.address]
    if asked != "auto":
        return tuple(each for each in usable if each.name == asked)
    open_ones = [each for each in usable if not each.name.startswith(HOST_LOCAL)]
    return tuple(sorted(open_ones, key=lambda each: (each.loopback, not each.wired, -(each.bytes_per_s or 0))))
