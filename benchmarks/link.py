"""Network namespaces joined by a switch with links of known speed: hosts with a slow network on one machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["addresses", "missing", "slow_link"]


def addresses(hosts: int = 2) -> tuple[str, ...]:
    """Of the hosts, in order.

    >>> addresses()
    ('10.99.7.1', '10.99.7.2')
    """
    return tuple(f"10.99.7.{number + 1}" for number in range(hosts))


def missing() -> str | None:
    """Why a link cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{absent[0]} (iproute2) is not installed" if absent else None


@contextmanager
def slow_link(rate_mbit_s: float, *, hosts: int = 2) -> Iterator[list[list[str]]]:
    """Makes the namespaces; yields for each host the words that a command is put behind. The device is `eth0`.

    Args:
        rate_mbit_s: of each host's link to the switch, each way; inside of a host nothing is slowed down.
        hosts: how many.
    """
    switch = f"meshwright-{os.getpid()}-switch"
    names = [f"meshwright-{os.getpid()}-{number}" for number in range(hosts)]
    shape = f"tbf rate {rate_mbit_s}mbit burst 64k latency 100ms"
    try:
        for name in (switch, *names):
            _run("ip", "netns", "add", name)
        _run(*f"ip -n {switch} link add name joint type bridge".split())
        _run(*f"ip -n {switch} link set joint up".split())
        for number, (name, address) in enumerate(zip(names, addresses(hosts), strict=True)):
            port = f"port{number}"
            _run(*f"ip -n {switch} link add {port} type veth peer name eth0 netns {name}".split())
            _run(*f"ip -n {switch} link set {port} master joint up".split())
            _run(*f"ip -n {name} addr add {address}/24 dev eth0".split())
            _run(*f"ip -n {name} link set eth0 up".split())
            _run(*f"ip -n {name} link set lo up".split())
            _run(*f"tc -n {name} qdisc add dev eth0 root {shape}".split())
            _run(*f"tc -n {switch} qdisc add dev {port} root {shape}".split())
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
