"""Looks at a run that has its launcher elsewhere: its lines as they come, and its end."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from meshwright.clusters.records import clean_line
from meshwright.launch.beats import Beats
from meshwright.launch.logs import LogTail
from meshwright.launch.looks import Looks
from meshwright.launch.queues import queue_of
from meshwright.launch.runs import Known, Standing

__all__ = ["LAST_LINE", "watch"]

LAST_LINE = "run directory: "
"""Start of the last line that a launcher says."""

_LOOK_S = 0.2
_LAST_WORDS_S = 3.0
_HELD_S = 120.0  # as long as Slurm holds what it queued again


class _Screen:
    """Prints lines until the launcher's last one."""

    def __init__(self, screen: TextIO) -> None:
        self._screen, self.last = screen, False

    def __call__(self, raw: bytes) -> None:
        line = clean_line(raw)
        self.last = self.last or line.startswith(LAST_LINE)
        with suppress(BrokenPipeError):
            self._screen.write(f"{line}\n")
            self._screen.flush()


def watch(known: Known, *, interrupted: Callable[[], None] | None = None, screen: TextIO | None = None) -> Standing:
    """Prints what a run says until it is over.

    Args:
        known: the run.
        interrupted: what Ctrl-C does, once; None lets it end the watching only.
        screen: where lines go; standard output unless given.
    """
    run_dir = Path(known.run_dir)
    said = run_dir / "launcher.log"
    show = _Screen(screen or sys.stdout)
    tail = LogTail(said if said.exists() or known.job is not None else run_dir / "merged.log", show)
    asked: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if interrupted else ()
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        return _until_over(known, tail, show, pressed=lambda: _act(asked, interrupted))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        tail.close()


def _act(asked: list[int], interrupted: Callable[[], None] | None) -> None:
    if asked and interrupted is not None:
        asked.clear()
        interrupted()


def _until_over(known: Known, tail: LogTail, show: _Screen, *, pressed: Callable[[], None]) -> Standing:
    record, looks, queued = Path(known.run_dir, "exit.json"), Looks(known), _Queued(known)
    while True:
        pressed()
        tail.read()
        now = looks.news()
        if now is not None:
            if looks.over:
                break
            queued.stands(now.state)
        queued.look()
        time.sleep(_LOOK_S)
    if record.exists():
        _last_words(tail, show)
    return now


class _Queued:
    """What a run in a queue needs of whoever looks at it, since its launcher may be gone with its node.

    Args:
        known: the run.
    """

    def __init__(self, known: Known) -> None:
        self._known, self._state = known, ""
        self._until_s: float | None = None
        self._beats = Beats(Path(known.run_dir))

    def stands(self, state: str) -> None:
        """Takes how the run stands; one that its queue took up again is not to wait.

        A queue is asked until it does: a job that it just took up again does not say yet why it waits.
        """
        known, self._state, now_s = self._known, state, time.monotonic()
        if known.job is None or state != "pending":
            self._until_s = None
            return
        self._until_s = now_s + _HELD_S if self._until_s is None else self._until_s
        if now_s < self._until_s and queue_of(known.cluster, known.job).start_again_soon(known.job):
            self._until_s = now_s
            sys.stderr.write(f"meshwright: job {known.job} is queued again, and was asked to start soon\n")

    def look(self) -> None:
        """Says that the launcher is not heard of, while the run is said to go on."""
        if self._state == "running" and (words := self._beats.news()):
            sys.stderr.write(f"meshwright: {words}\n")


def _last_words(tail: LogTail, show: _Screen) -> None:
    """What a launcher says after its record is written."""
    end_s = time.monotonic() + _LAST_WORDS_S
    while not show.last and time.monotonic() < end_s:
        if not tail.read():
            time.sleep(_LOOK_S / 4)
