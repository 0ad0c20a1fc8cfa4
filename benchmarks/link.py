"""Two network namespaces joined by a link of known speed: two hosts with a slow network on one machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ADDRESSES", "missing", "slow_link"]

ADDRESSES = ("10.99.7.1", "10.99.7.2")


def missing() -> str | None:
    """Why a link cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{absent[0]} (iproute2) is not installed" if absent else None


@contextmanager
def slow_link(rate_mbit_s: float) -> Iterator[list[list[str]]]:
    """Makes the namespaces; yields for each host the words that a command is put behind. The device is `eth0`."""
    names = [f"meshwright-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run(*f"ip -n {names[0]} link add eth0 type veth peer name eth0 netns {names[1]}".split())
        for name, address in zip(names, ADDRESSES, strict=True):
            _run(*f"ip -n {name} addr add {address}/24 dev eth0".split())
            _run(*f"ip -n {name} link set eth0 up".split())
            _run(*f"ip -n {name} link set lo up".split())
            shape = f"tbf rate {rate_mbit_s}mbit burst 64k latency 100ms"
            _run(*f"tc -n {name} qdisc add dev eth0 root {shape}".split())
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
