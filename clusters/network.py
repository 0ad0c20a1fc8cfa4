"""Which address a node is reached at, who listens where, and whether others get through. IPv4, without torch."""

import fcntl
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

from meshwright.clusters.errors import RendezvousError

__all__ = ["bind_free", "dial", "interface_of", "interfaces", "own_address", "way_to"]

_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """Name -> address of every interface that has one.

    >>> "127.0.0.1" in interfaces().values()
    True
    """
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found[name] = socket.inet_ntoa(packed[20:24])
    return found


def interface_of(address: str) -> str | None:
    """Name of the interface with an address of this machine."""
    return next((name for name, each in interfaces().items() if each == address), None)


def way_to(address: str) -> str:
    """The address of this machine from which another one is reached; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def own_address(interface: str, names: Iterable[str]) -> str:
    """The address of this machine that others are to use.

    Args:
        interface: name of one, or "auto".
        names: what this machine may be called by others, the surest first; names that lead to loopback or to another
            machine are passed over.

    Raises:
        RendezvousError: when there is no such interface or address.
    """
    here = interfaces()
    if interface != "auto":
        if interface not in here:
            raise RendezvousError(
                f"rendezvous.interface: {socket.gethostname()} has no interface {interface!r} with an IPv4 address; "
                f"it has {', '.join(f'{name} ({each})' for name, each in sorted(here.items()))}"
            )
        return here[interface]
    tried = [name for name in names if name]
    for name in tried:
        with suppress(OSError):
            address = socket.gethostbyname(name)
            if address in here.values() and not address.startswith("127."):
                return address
    raise RendezvousError(
        f"rendezvous.interface: {', '.join(tried)}: none is an address of {socket.gethostname()} itself that other "
        f"machines can reach (it has {', '.join(sorted(here.values()))}); name the interface"
    )


def bind_free(address: str, port: int | None, ports: tuple[int, int]) -> socket.socket:
    """A socket that listens on one address, at a port or the first free one of a range.

    Raises:
        RendezvousError: when none can be taken.
    """
    last: OSError | None = None
    for each in (port,) if port is not None else range(ports[0], ports[1] + 1):
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((address, each))
            held.listen(4096)
            return held
        except OSError as error:
            held.close()
            last = error
    first, end = ports
    what = f"rendezvous.port: port {port}" if port is not None else f"rendezvous.port_range: no port of {first}-{end}"
    raise RendezvousError(
        f"{what} of {address or 'this machine'} on {socket.gethostname()} can be taken: "
        f"{last.strerror if last else 'the range is empty'}; choose others"
    )


def dial(address: str, port: int, timeout_s: float) -> None:
    """Makes sure that somebody listens at an address and can be reached from here.

    Raises:
        RendezvousError: when not; says from where and why.
    """
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError as error:
        raise RendezvousError(
            f"{socket.gethostname()} cannot reach {address} port {port}, where the first node listens: "
            f"{error.strerror or error}; name the network they share by rendezvous.interface, or open the port "
            "(rendezvous.port, port_range)"
        ) from error
