"""Xid errors: what NVIDIA's driver wrote into the kernel's log, and which of them mean that a GPU is sick.

The numbers follow NVIDIA's catalog "Xid errors" (docs.nvidia.com/deploy/xid-errors).
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from meshwright.clusters.gpus import Xid

__all__ = ["CRITICAL_XIDS", "KMSG", "logged_xids", "parse_xids", "records"]

CRITICAL_XIDS = {
    46: "the GPU stopped processing",
    48: "a double-bit memory error",
    62: "an internal micro-controller halted",
    64: "a page or row could not be put out of use",
    74: "an NVLink error",
    79: "the GPU fell off the bus",
    95: "an uncontained memory error",
    109: "a context switch timed out",
    110: "a security fault",
    119: "the GPU's system processor did not answer",
    120: "an error of the GPU's system processor",
    136: "link training failed",
    140: "an unrecovered memory error",
    143: "the GPU did not initialise",
}
"""Numbers that speak of the hardware or the driver; others, such as 13, 31, 43 and 45, mostly of a program."""

_LINE = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+),? ?(.*)")
KMSG = Path("/dev/kmsg")
"""The kernel's log."""

_RECORD_BYTES = 8192


def parse_xids(lines: Iterable[str]) -> tuple[Xid, ...]:
    """The Xid errors in lines of a kernel's log.

    >>> parse_xids(["[ 12.3] NVRM: Xid (PCI:0000:3B:00): 79, pid=812, GPU has fallen off the bus.", "eth0: link up"])
    (Xid(number=79, bus_id='0000:3b:00', text='pid=812, GPU has fallen off the bus.'),)
    """
    found = (_LINE.search(line) for line in lines)
    return tuple(Xid(int(each[2]), each[1].lower().partition(".")[0], each[3].strip()) for each in found if each)


def logged_xids(log: Path = KMSG) -> tuple[Xid, ...] | None:
    """The Xid errors since this machine started; None where its kernel's log is not for this user."""
    try:
        file = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return parse_xids(records(file))
    finally:
        os.close(file)


def records(file: int) -> Iterator[str]:
    """Lines of the kernel's log, one record a read, until there is none; those overwritten meanwhile are left out.

    Args:
        file: descriptor of the log, which does not block.
    """
    while True:
        try:
            record = os.read(file, _RECORD_BYTES)
        except BrokenPipeError:
            continue
        except OSError:
            return
        if not record:
            return
        yield from record.decode(errors="replace").splitlines()
