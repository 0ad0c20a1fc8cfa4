"""A node's GPUs are looked at while ranks run on them: every fault is told once, and may end the attempt.

    agent of a node --(every interval)--> NVML, kernel's log --> faults --> launcher, and what follows a failure

Faults are those of the doctor, but of the GPUs of this node's ranks only; Xid errors count from the start of the run.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

from meshwright.clusters.gpus import NO_DRIVER, NO_GPU, NO_LIBRARY, Gpu, GpuReport, Xid
from meshwright.clusters.turns import Turns

__all__ = ["GpuWatch", "Watch", "faults_of", "shown_gpus", "watch_from"]


@dataclass(frozen=True)
class Watch:
    """What is looked at.

    Args:
        interval_s: between two readings.
        max_temp_c: temperature that counts as a fault, besides that at which a GPU slows down.
        xid: which Xid errors are faults: "critical", "any" or "ignore".
        restarts: whether a fault ends the attempt, so that the run goes on without the node.
    """

    interval_s: float = 10.0
    max_temp_c: float | None = None
    xid: str = "critical"
    restarts: bool = False

    def __str__(self) -> str:
        hot = "" if self.max_temp_c is None else f", {self.max_temp_c:g} C"
        then = "the run goes on without the node" if self.restarts else "it is said and kept"
        return f"GPUs every {self.interval_s:g} s ({self.xid} Xid errors{hot}); at a fault {then}"


def watch_from(saved: Any) -> Watch | None:
    """The watch of a plan's JSON form."""
    return None if saved is None else Watch(**saved)


def shown_gpus(visible: str | None) -> frozenset[int] | None:
    """GPUs that CUDA_VISIBLE_DEVICES shows; None for all, or for words that only the driver could turn into numbers.

    >>> sorted(shown_gpus("0,2")), shown_gpus(""), shown_gpus("GPU-6a2f")
    ([0, 2], frozenset(), None)
    """
    words = [] if visible is None else [word.strip() for word in visible.split(",") if word.strip()]
    if visible is None or not all(word.isdecimal() for word in words):
        return None
    return frozenset(map(int, words))


def faults_of(
    report: GpuReport, watch: Watch, *, gpus: Collection[int] | None = None, before: Collection[Xid] = ()
) -> Iterator[str]:
    """Faults of a node's GPUs, in words; pure.

    Args:
        report: what the driver told.
        watch: what counts.
        gpus: indices that count; None is all.
        before: Xid errors that were there when the run began.
    """
    from meshwright.clusters.health_gpus import faults_of_gpu, faults_of_node

    yield from faults_of_node(report)
    kept = [gpu for gpu in report.gpus if gpus is None or gpu.index in gpus]
    for gpu in kept:
        yield from (*faults_of_gpu(gpu), *_of_heat(gpu, watch.max_temp_c))
    buses = {gpu.bus.bus_id for gpu in kept}
    for xid in Counter(report.xids or ()) - Counter(before):
        if gpus is None or xid.bus_id in buses:
            yield from _of_xid(xid, watch.xid)


def _of_heat(gpu: Gpu, max_temp_c: float | None) -> Iterator[str]:
    if max_temp_c is not None and (gpu.heat.temperature_c or 0) >= max_temp_c:
        yield f"GPU {gpu.index}: {gpu.heat.temperature_c} C, health.watch.max_temp_c is {max_temp_c:g}"


def _of_xid(xid: Xid, which: str) -> Iterator[str]:
    from meshwright.clusters.xid import CRITICAL_XIDS

    if which == "any" or (which == "critical" and xid.number in CRITICAL_XIDS):
        yield f"GPU at {xid.bus_id}: Xid {xid.number}: {CRITICAL_XIDS.get(xid.number, xid.text)}"


class GpuWatch:
    """Looks at the GPUs of one node until the process ends.

    Args:
        watch: what is looked at.
        gpus: indices of the GPUs of this node's ranks; None is all.
        tell: sends an event to the launcher.
        read: asks the driver.
        turns: with who forks.
    """

    def __init__(
        self,
        watch: Watch,
        gpus: Collection[int] | None,
        *,
        tell: Callable[..., None],
        read: Callable[[], GpuReport],
        turns: Turns | None = None,
    ) -> None:
        self._watch, self._gpus, self._tell, self._read = watch, gpus, tell, read
        self._before: Collection[Xid] | None = None
        self._turns = turns or Turns()
        self._known: dict[str, float] = {}

    def start(self) -> None:
        """Looks now and then every interval, in a thread of its own."""
        Thread(target=self._look_for_ever, name="gpus", daemon=True).start()

    def _look_for_ever(self) -> None:
        while self.look():
            time.sleep(self._watch.interval_s)

    def look(self) -> bool:
        """Looks once and tells what is new; tells whether there is anything to look at."""
        with self._turns:
            report, now = self._read(), round(time.time(), 3)
        if self._before is None:
            self._before = report.xids or ()
            if report.state in (NO_LIBRARY, NO_DRIVER, NO_GPU):
                self._tell("health", fault=None, found=f"no GPU to watch: {report.why}", time_unix_s=now)
                return False
        known = {_kind(words) for words in self._known}
        for words in faults_of(report, self._watch, gpus=self._gpus, before=self._before):
            if _kind(words) not in known:
                known.add(_kind(words))
                self._known = {**self._known, words: now}  # a new one: another thread reads it
                self._tell("health", fault=words, found=words, time_unix_s=now)
        return True

    @property
    def fault(self) -> tuple[str, float] | None:
        """The first fault and when it was found; None while all is well."""
        return next(iter(self._known.items()), None)

    @property
    def ends_attempt(self) -> bool:
        """Whether ranks are to end for it."""
        return self._watch.restarts and bool(self._known)


def _kind(words: str) -> str:
    """A fault without its numbers: 89 C and then 90 C are one."""
    name, _, rest = words.partition(": ")
    return f"{name}: {re.sub(r'[0-9]+', '#', rest) if 'Xid' not in rest else rest}"
