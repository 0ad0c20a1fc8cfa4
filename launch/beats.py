"""Whether the launcher of a queued run is heard of: its node may be gone long before the queue says so."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from meshwright.clusters.files import alive_file
from meshwright.clusters.lease import LOST_AFTER_S

__all__ = ["Beats"]

_LOOK_S = 0.5


class Beats:
    """Looks at the file that a launcher touches as long as it follows its run; one that is not there says nothing.

    Args:
        run_dir: of the run.
        clock_s: seconds of this machine; those of the file are only compared with each other.
    """

    def __init__(self, run_dir: Path, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._clock_s = run_dir, clock_s
        self._touched: int | None = None
        self._since_s = self._next_s = clock_s()
        self._silent = False

    def news(self) -> str | None:
        """That the launcher is not heard of any more, or that it is again, once each."""
        now_s = self._clock_s()
        if now_s < self._next_s:
            return None
        self._next_s = now_s + _LOOK_S
        touched = _touched(alive_file(self._run_dir))
        if touched != self._touched or touched is None:
            was_silent, self._silent = self._silent, False
            self._touched, self._since_s = touched, now_s
            return f"node {self._node()}: the launcher there is heard of again" if was_silent and touched else None
        if self._silent or now_s - self._since_s < LOST_AFTER_S:
            return None
        self._silent = True
        return (
            f"node {self._node()}: the launcher there was not heard of for {LOST_AFTER_S:g} s; is the node up, and its "
            "link? The queue decides what follows, once it takes the node for lost"
        )

    def _node(self) -> str:
        """Name of the first node, on which the launcher is."""
        with suppress(OSError, ValueError, KeyError, IndexError):
            return str(json.loads((self._run_dir / "plan.json").read_text())["nodes"][0]["name"])
        return "of the launcher"


def _touched(path: Path) -> int | None:
    """When a file was changed; it is opened, since network file systems only then ask whether that is still so."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return os.fstat(held).st_mtime_ns
    finally:
        os.close(held)
