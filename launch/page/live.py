"""The page of a run while it goes on, written by its launcher, so that a browser that is left open shows how it stands.

A thread writes it: a file system that answers late, or a long curve, keeps no launcher from its ranks.
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

from meshwright.clusters.node_counters import FOLDER
from meshwright.launch.page.document import Live
from meshwright.launch.page.write import PAGE, write_page
from meshwright.launch.rundir import EXCLUDED_FILE, HEALTH_FILE
from meshwright.launch.supervise import RunState

__all__ = ["LivePage"]

_EVERY_S = 10.0
_SHARE = 20  # of the time, at most one part is for pages
_MOST_BYTES = 64 << 20
_LAST_S = 30.0
_FILES = ("metrics.jsonl", HEALTH_FILE, EXCLUDED_FILE)


class LivePage:
    """Writes the page again where something is new; at an error it says so once, and writes no more.

    Args:
        run_dir: of the run.
        say: takes one line for people.
        every_s: how often, at most; also when the page asks for itself again.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], object], *, every_s: float = _EVERY_S) -> None:
        self._run_dir, self._say, self._every_s = run_dir, say, every_s
        self._next_s = 0.0
        self._thread: Thread | None = None
        self._seen: object = None
        self._error = ""
        self._over = Event()

    def __call__(self, state: RunState) -> None:
        """Has the page written, if it is time and ranks have been started."""
        if self._over.is_set() or not state.attempt_unix_s or time.monotonic() < self._next_s or self._writes:
            return
        if self._error:
            self._over.set()
            self._say(f"meshwright: {PAGE} waits for the end of the run: {self._error}")
            return
        self._next_s = time.monotonic() + self._every_s
        self._thread = Thread(target=self._write, args=(Live(state.attempt, self._every_s),), name="page", daemon=True)
        self._thread.start()

    @property
    def _writes(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, live: Live) -> None:
        began_s = time.monotonic()
        try:
            now = live.attempt, *self._found()
            if now != self._seen:
                write_page(self._run_dir, state="running", live=live, if_wanted=lambda: not self._over.is_set())
                self._seen = now
        except Exception as error:  # the run is what matters
            self._error = f"{type(error).__name__}: {error}"
        done_s = time.monotonic()
        self._next_s = max(self._next_s, done_s + _SHARE * (done_s - began_s))

    def _found(self) -> tuple[tuple[str, int, int], ...]:
        """What there is to show: file, bytes, when it was changed.

        Raises:
            ValueError: when there is more than can be drawn again and again.
        """
        paths = [*(self._run_dir / name for name in _FILES), *sorted((self._run_dir / FOLDER).glob("*.jsonl"))]
        found = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists())
        if (size := sum(each for _, each, _ in found)) > _MOST_BYTES:
            raise ValueError(f"its files have {size:,} bytes, and up to {_MOST_BYTES:,} are drawn while it goes on")
        return found

    def close(self) -> None:
        """Writes no more; a page that is not done by then takes no other's place."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_LAST_S)
