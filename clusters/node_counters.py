"""What one node does while its ranks run: a line of `nodes/NODE.jsonl` in the run directory every few seconds.

The agent of each node counts, not a rank and not the launcher: it is there on every node whatever program runs, also
while ranks hang, and no step pays for it. It writes a file of its own, which comes to the launcher as metrics do where
nodes share no directory; events of 1,000 nodes would all go through one process and stay for ever.

Files are bounded: the older half of a full one is made half as dense, so that a month is as long as an hour.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from meshwright.clusters.lines import write_all
from meshwright.clusters.turns import Turns
from meshwright.clusters.usage import (
    GpuUse,
    cpu_ticks,
    gpus_now,
    loopback_bytes,
    memory_used_bytes,
    network_traffic,
    rdma_traffic,
)
from meshwright.clusters.watching import shown_gpus

__all__ = ["FOLDER", "NodeCounters", "NodeReader", "counters_of", "interval_of", "most_of", "thinned"]

FOLDER = "nodes"
"""Folder of a run directory."""

Record = Mapping[str, Any]

_EVERY_S, _FIRST_S = 5.0, 1.0
_NODES_PER_S = 50
_OF_ALL, _MOST, _LEAST = 50_000, 1_000, 50
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
_HIGHEST = ("memory_used_bytes", "gpu_memory_used_bytes", "gpu_temperature_c")
_NEWEST = ("time_unix_s", "node")


def interval_of(num_nodes: int) -> float:
    """Seconds between two lines of a node: 5, more where all nodes would write more than 50 lines a second.

    >>> interval_of(8), interval_of(1000)
    (5.0, 20.0)
    """
    return max(_EVERY_S, num_nodes / _NODES_PER_S)


def most_of(num_nodes: int) -> int:
    """Lines that a node's file has at most: 50,000 (12 MB) of all nodes, but 50 to 1,000 of each.

    >>> most_of(8), most_of(1000)
    (1000, 50)
    """
    return max(_LEAST, min(_MOST, _OF_ALL // num_nodes))


def thinned(records: Sequence[Record]) -> list[Record]:
    """The older half of records at half the density: bytes and seconds add up, shares are averaged, peaks stay.

    >>> thinned([{"time_unix_s": t, "counted_s": 5.0, "gpu_temperature_c": 40 + t} for t in (1, 2, 3, 4)])[0]
    {'time_unix_s': 2, 'counted_s': 10.0, 'gpu_temperature_c': 42}
    """
    half = len(records) // 4 * 2
    merged = [_merged(first, second) for first, second in zip(records[:half:2], records[1:half:2], strict=True)]
    return [*merged, *records[half:]]


def _merged(first: Record, second: Record) -> Record:
    return {key: _joined(key, [each[key] for each in (first, second) if key in each]) for key in {**first, **second}}


def _joined(key: str, values: Sequence[Any]) -> Any:
    if key in _NEWEST:
        return values[-1]
    if key in _HIGHEST:
        return max(values)
    if key == "counted_s" or key.endswith("_bytes"):
        return sum(values)
    return round(sum(values) / len(values), 4)


class NodeReader:
    """Counters of this machine since the last reading.

    Args:
        gpus: indices of NVML; None is all.
        turns: with who forks.
        ask: how busy those GPUs are.
    """

    def __init__(
        self,
        gpus: Collection[int] | None,
        turns: Turns,
        ask: Callable[[Collection[int] | None], Iterable[GpuUse]] = gpus_now,
    ) -> None:
        self._gpus, self._turns, self._ask = gpus, turns, ask
        self._since_s, self._ticks = time.monotonic(), cpu_ticks()
        self._loopback, self._network, self._rdma = loopback_bytes(), network_traffic(), rdma_traffic()

    def read(self) -> dict[str, Any]:
        """What is there, by the names that metrics.jsonl has for it; `gpu_*` of all GPUs of the node."""
        with self._turns:
            gpus = list(self._ask(self._gpus))
        now_s = time.monotonic()
        found = {"counted_s": round(now_s - self._since_s, 3), **self._host(), **_of_gpus(gpus)}
        self._since_s = now_s
        return {key: value for key, value in found.items() if value is not None}

    def _host(self) -> dict[str, Any]:
        network, rdma, loopback, ticks = network_traffic(), rdma_traffic(), loopback_bytes(), cpu_ticks()
        found: dict[str, Any] = {"memory_used_bytes": memory_used_bytes()}
        if network is not None:
            more, self._network = network.since(self._network or network), network
            found |= {"network_sent_bytes": more.sent_bytes, "network_received_bytes": more.received_bytes}
        if rdma is not None:
            more, self._rdma = rdma.since(self._rdma or rdma), rdma
            found |= {"rdma_sent_bytes": more.sent_bytes, "rdma_received_bytes": more.received_bytes}
        if loopback is not None:
            before = loopback if self._loopback is None else self._loopback
            found["loopback_bytes"], self._loopback = max(0, loopback - before), loopback
        if ticks is not None and self._ticks is not None and ticks[1] > self._ticks[1]:
            found["cpu_utilisation"] = round((ticks[0] - self._ticks[0]) / (ticks[1] - self._ticks[1]), 4)
        self._ticks = ticks
        return found


def _of_gpus(gpus: Sequence[GpuUse]) -> dict[str, Any]:
    """Mean and least of their use, the fullest and the hottest of them, power of all."""
    busy = [each.utilisation for each in gpus if each.utilisation is not None]
    power = [each.power_w for each in gpus if each.power_w is not None]
    return {
        "gpu_utilisation": round(sum(busy) / len(busy), 4) if busy else None,
        "gpu_utilisation_least": min(busy, default=None),
        "gpu_memory_used_bytes": max((each.memory_used_bytes for each in gpus if each.memory_used_bytes), default=None),
        "gpu_power_w": round(sum(power), 1) if power else None,
        "gpu_temperature_c": max((each.temperature_c for each in gpus if each.temperature_c), default=None),
    }


class NodeCounters:
    """Writes what a reader finds, in a thread of its own, until the process ends.

    Args:
        path: the file; what another start of the run wrote there stays.
        node: name of the node.
        read: counters since the last call.
        interval_s: between two lines, once the first ones are there.
        most: lines that the file has at most.
    """

    def __init__(
        self, path: Path, node: str, *, read: Callable[[], Record], interval_s: float = _EVERY_S, most: int = _MOST
    ) -> None:
        self._path, self._node, self._read = path, node, read
        self._interval_s, self._most = interval_s, most
        self._count: int | None = None
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begins to count, once."""
        if self._thread is None:
            self._thread = Thread(target=self._count_for_ever, name="counters", daemon=True)
            self._thread.start()

    def _count_for_ever(self) -> None:
        began_s = time.monotonic()
        while True:
            time.sleep(max(_FIRST_S, min(self._interval_s, time.monotonic() - began_s)))
            try:
                self.write()
            except Exception as error:  # a run is not to suffer from being looked at
                sys.stderr.write(f"node {self._node} is not counted any more: {type(error).__name__}: {error}\n")
                return

    def write(self) -> None:
        """Adds one line; a file that cannot be written has one less."""
        record = {"node": self._node, "time_unix_s": round(time.time(), 3), **self._read()}
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            if self._count is None or self._count >= self._most:
                self._make_room()
            write_all(self._path, [_line(record)])
            self._count = (self._count or 0) + 1

    def _make_room(self) -> None:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        records: list[Mapping[str, Any]] = [record for line in lines if (record := _record(line)) is not None]
        self._count = len(records)
        while self._count >= self._most or len(lines) > len(records):
            lines = []
            records = thinned(records) if self._count >= self._most else records
            self._count = len(records)
            part = self._path.with_name(f".{self._path.name}.part")
            part.unlink(missing_ok=True)
            write_all(part, [_line(each) for each in records])
            os.replace(part, self._path)


def _record(line: str) -> dict[str, Any] | None:
    """What a line holds; None where it is torn, with its disk full or its machine gone."""
    with suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, dict) else None
    return None


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def counters_of(plan: Mapping[str, Any], node: int, turns: Turns | None = None) -> NodeCounters:
    """Those of one node of a run, which begin when they are started.

    Args:
        plan: of the run, as a dictionary.
        node: index of the node.
        turns: with who forks.
    """
    num_nodes, name = len(plan["nodes"]), plan["nodes"][node]["name"]
    seen = {**os.environ, **dict(plan["nodes"][node]["env"])}
    reader = NodeReader(shown_gpus(seen.get("CUDA_VISIBLE_DEVICES")), turns or Turns())
    path = Path(plan["run_dir"], FOLDER, f"{_NOT_IN_NAMES.sub('-', name)}.jsonl")
    return NodeCounters(path, name, read=reader.read, interval_s=interval_of(num_nodes), most=most_of(num_nodes))
