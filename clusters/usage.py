"""What this node does now: bytes that went over its network, and how busy its processors and GPUs are.

A file, a library or a GPU that is not there is an ordinary answer (None), never an error.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.clusters.interfaces import HOST_LOCAL

__all__ = [
    "GpuMeter",
    "GpuUse",
    "Traffic",
    "cpu_ticks",
    "gpus_now",
    "loopback_bytes",
    "memory_used_bytes",
    "network_traffic",
    "rdma_traffic",
]

_COUNTS = Path("/proc/net/dev")
_NET = Path("/sys/class/net")
_RDMA = Path("/sys/class/infiniband")
_STAT = Path("/proc/stat")
_MEMORY = Path("/proc/meminfo")
_RDMA_WORD_BYTES = 4
"""port_xmit_data and port_rcv_data count words of 4 octets (Linux, Documentation/ABI/stable/sysfs-class-infiniband)."""

_RECEIVED, _SENT = 0, 8
"""Columns of /proc/net/dev behind an interface's name."""

_IDLE = slice(3, 5)
"""Of the first line of /proc/stat: what processors did nothing in, and what they waited for disks in."""

_TEMPERATURE = 0


@dataclass(frozen=True)
class Traffic:
    """Bytes in both directions, since the interfaces came up."""

    sent_bytes: int
    received_bytes: int

    def since(self, before: "Traffic") -> "Traffic":
        """What came on top; nothing where an interface that was counted has gone.

        >>> Traffic(5, 9).since(Traffic(2, 9))
        Traffic(sent_bytes=3, received_bytes=0)
        """
        sent, received = self.sent_bytes - before.sent_bytes, self.received_bytes - before.received_bytes
        return Traffic(max(0, sent), max(0, received))


@dataclass(frozen=True)
class GpuUse:
    """One GPU at one moment; None for what its driver does not tell.

    Args:
        utilisation: share of the last sampling period (up to a second) in which a kernel ran, 0 to 1.
        memory_used_bytes: taken, by all processes and the driver.
        power_w: drawn by the board.
        temperature_c: of the chip.
    """

    utilisation: float | None = None
    memory_used_bytes: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None


def network_traffic(counts: Path = _COUNTS, net: Path = _NET) -> Traffic | None:
    """Bytes of all interfaces that lead out of this host, each byte once.

    Loopback, bridges of containers, and the parts of a bond are left out; what RDMA moves does not pass the kernel and
    is in `rdma_traffic`.

    Args:
        counts: /proc/net/dev, or a file like it.
        net: the folder with what the kernel tells of each interface.
    """
    rows = _rows(counts)
    if rows is None:
        return None
    inside = {name for name in rows if name == "lo" or name.startswith(HOST_LOCAL)}
    parts = {name for name in rows if (net / name / "bonding_slave").exists()}
    return _sum(rows[name] for name in rows.keys() - inside - parts)


def loopback_bytes(counts: Path = _COUNTS) -> int | None:
    """Bytes that processes of this host sent to each other over loopback."""
    rows = _rows(counts)
    return None if rows is None else _sum(row for name, row in rows.items() if name == "lo").sent_bytes


def _rows(counts: Path) -> dict[str, list[int]] | None:
    try:
        lines = counts.read_text().splitlines()[2:]
    except OSError:
        return None
    named = (line.partition(":") for line in lines)
    return {name.strip(): [int(word) for word in words.split()] for name, _, words in named}


def _sum(rows: Iterable[list[int]]) -> Traffic:
    kept = list(rows)
    return Traffic(sum(row[_SENT] for row in kept), sum(row[_RECEIVED] for row in kept))


def rdma_traffic(folder: Path = _RDMA) -> Traffic | None:
    """Bytes of all InfiniBand and RoCE ports; None on a node without one."""
    ports = list(folder.glob("*/ports/*/counters"))
    try:
        sent = sum(int((port / "port_xmit_data").read_text()) for port in ports)
        received = sum(int((port / "port_rcv_data").read_text()) for port in ports)
    except (OSError, ValueError):  # a device that counts nothing, or is being reset
        return None
    return Traffic(_RDMA_WORD_BYTES * sent, _RDMA_WORD_BYTES * received) if ports else None


def cpu_ticks(stat: Path = _STAT) -> tuple[int, int] | None:
    """Ticks in which processors of this host were busy, and all ticks, since it started.

    Args:
        stat: /proc/stat, or a file like it.
    """
    try:
        ticks = [int(word) for word in stat.read_text().partition("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(ticks) - sum(ticks[_IDLE]), sum(ticks)) if ticks else None


def memory_used_bytes(memory: Path = _MEMORY) -> int | None:
    """Memory of this host that programs could not have, caches not counted.

    Args:
        memory: /proc/meminfo, or a file like it.
    """
    try:
        told = dict(line.split(":") for line in memory.read_text().splitlines())
        return (int(told["MemTotal"].split()[0]) - int(told["MemAvailable"].split()[0])) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None


class GpuMeter:
    """Asks NVML how busy one GPU is.

    Args:
        which: its uuid, such as "GPU-6a2f..." (indices of NVML and of CUDA_VISIBLE_DEVICES differ), or NVML's index.
    """

    def __init__(self, which: str | int) -> None:
        self._library, self._handle = _opened(which)

    def read(self) -> GpuUse | None:
        """How busy it is now; None where there is no library, no driver, or no such GPU."""
        if self._handle is None:
            return None
        rates, memory = self._ask("nvmlDeviceGetUtilizationRates"), self._ask("nvmlDeviceGetMemoryInfo")
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return GpuUse(
            utilisation=None if rates is None else rates.gpu / 100,
            memory_used_bytes=None if memory is None else int(memory.used),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=self._ask("nvmlDeviceGetTemperature", _TEMPERATURE),
        )

    def _ask(self, question: str, *words: Any) -> Any:
        try:
            return getattr(self._library, question)(self._handle, *words)
        except Exception:  # NVMLError, and what the Python library raises where the driver's is older than it
            return None

    def close(self) -> None:
        """Asks no more."""
        if self._library is not None:
            with suppress(Exception):
                self._library.nvmlShutdown()


def _opened(which: str | int) -> tuple[Any, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        find = pynvml.nvmlDeviceGetHandleByIndex if isinstance(which, int) else pynvml.nvmlDeviceGetHandleByUUID
        return pynvml, find(which)
    except Exception:  # no package, no library, no driver, another package of this name, no such GPU
        return None, None


def gpus_now(gpus: Collection[int] | None = None) -> list[GpuUse]:
    """How busy GPUs of this node are now; none where nobody tells. Nothing of the library stays open.

    Args:
        gpus: indices of NVML; None is all.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # as above
        return []
    try:
        shown = [index for index in range(pynvml.nvmlDeviceGetCount()) if gpus is None or index in gpus]
        return [use for index in shown if (use := _use_of(index)) is not None]
    except Exception:  # a driver that was taken away meanwhile
        return []
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()


def _use_of(index: int) -> GpuUse | None:
    """Of one GPU; the library counts who opened it, and is left as it was found."""
    meter = GpuMeter(index)
    try:
        return meter.read()
    finally:
        meter.close()
