"""What an agent does when whoever started it asks it to end: a queue warns and ends by the same signal.

agent --asked--> launcher, which asks the queue --(leave, stop)--> agent
"""

import time
from collections.abc import Callable
from threading import Event, Thread

__all__ = ["Asking"]

_WORD_S = 12.0  # more than the launcher waits for the queue, which it asks twice, 5 s each
_SILENT_S = 6.0  # a launcher that is there is heard of every two seconds
_LOOK_S = 0.05


class Asking:
    """A handler of signals that has the launcher find out what they mean; without its word they are the end.

    They are at once where the launcher itself is gone, which is what a queue ends a step for, too.

    Args:
        tell: sends an event to the launcher.
        stop: ends the ranks with grace.
        silent_s: seconds since the launcher was heard of.
        word_s: how long the launcher's word is waited for.
    """

    def __init__(
        self,
        tell: Callable[..., object],
        stop: Callable[[], object],
        *,
        silent_s: Callable[[], float],
        word_s: float = _WORD_S,
    ) -> None:
        self._tell, self._stop, self._silent_s, self._word_s = tell, stop, silent_s, word_s
        self._told = Event()

    def __call__(self, *_: object) -> None:
        """Takes a signal."""
        Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        self._told.clear()
        self._tell("asked")
        end_s = time.monotonic() + self._word_s
        while not self._told.wait(_LOOK_S):
            if time.monotonic() > end_s or self._silent_s() > _SILENT_S:
                self._stop()
                return

    def hear(self, command: str) -> None:
        """Takes a command of the launcher; a warning is said again and again, so one from before is no answer."""
        if command in ("leave", "stop"):
            self._told.set()
