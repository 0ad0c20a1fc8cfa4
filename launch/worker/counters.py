"""What rank 0's host and GPU did since the step that was logged before: counters for metrics.jsonl."""

import os
import time
from pathlib import Path

import torch

from meshwright.clusters.usage import GpuMeter, Traffic, loopback_bytes, network_traffic, rdma_traffic

__all__ = ["Counters"]

_NOTHING = Traffic(0, 0)


class Counters:
    """Reads counters of this host and this rank's GPU; what is not there has no key.

    Args:
        device: of this rank.
        active: whether anybody writes down what is read; other ranks hold one that reads nothing.

    >>> Counters(torch.device("cpu"), active=False).read()
    {}
    """

    def __init__(self, device: torch.device, *, active: bool) -> None:
        self._active = active
        self._gpu = GpuMeter(_uuid(device)) if active and device.type == "cuda" else None
        self._since_s = time.monotonic()
        self._cpu_s = time.process_time()
        self._loopback = loopback_bytes() or 0
        self._network = network_traffic() or _NOTHING
        self._rdma = rdma_traffic() or _NOTHING

    def read(self) -> dict[str, float | int]:
        """Counters since the last reading, with their time `counted_s`; `gpu_*` and `resident_bytes` of this moment."""
        if not self._active:
            return {}
        now_s, cpu_s = time.monotonic(), time.process_time()
        found: dict[str, float | int | None] = {
            "counted_s": round(now_s - self._since_s, 6),
            "cpu_s": round(cpu_s - self._cpu_s, 6),
            "resident_bytes": _resident_bytes(),
            **self._bytes(),
            **self._gpu_now(),
        }
        self._since_s, self._cpu_s = now_s, cpu_s
        return {key: value for key, value in found.items() if value is not None}

    def _bytes(self) -> dict[str, float | int | None]:
        network, rdma, loopback = network_traffic(), rdma_traffic(), loopback_bytes()
        found: dict[str, float | int | None] = {}
        if network is not None:
            more, self._network = network.since(self._network), network
            found |= {"network_sent_bytes": more.sent_bytes, "network_received_bytes": more.received_bytes}
        if loopback is not None:
            found["loopback_bytes"], self._loopback = max(0, loopback - self._loopback), loopback
        if rdma is not None:
            more, self._rdma = rdma.since(self._rdma), rdma
            found |= {"rdma_sent_bytes": more.sent_bytes, "rdma_received_bytes": more.received_bytes}
        return found

    def _gpu_now(self) -> dict[str, float | int | None]:
        use = self._gpu.read() if self._gpu is not None else None
        if use is None:
            return {}
        return {
            "gpu_utilisation": use.utilisation,
            "gpu_memory_used_bytes": use.memory_used_bytes,
            "gpu_power_w": use.power_w,
            "gpu_temperature_c": use.temperature_c,
        }


def _uuid(device: torch.device) -> str:
    return f"GPU-{getattr(torch.cuda.get_device_properties(device), 'uuid', '')}"


def _resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where the system does not tell (/proc/self/statm, in pages)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
