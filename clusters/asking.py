"""What an agent does when whoever started it asks it to end: a queue warns and ends by the same signal.

agent --asked--> launcher, which asks the queue --(leave, stop)--> agent
"""

from collections.abc import Callable
from threading import Event, Thread

__all__ = ["Asking"]

_WORD_S = 12.0  # more than the launcher waits for the queue, which it asks twice, 5 s each


class Asking:
    """A handler of signals that has the launcher find out what they mean; without its word they are the end.

    Args:
        tell: sends an event to the launcher.
        stop: ends the ranks with grace.
        word_s: how long the launcher's word is waited for.
    """

    def __init__(self, tell: Callable[..., object], stop: Callable[[], object], *, word_s: float = _WORD_S) -> None:
        self._tell, self._stop, self._word_s = tell, stop, word_s
        self._told = Event()

    def __call__(self, *_: object) -> None:
        """Takes a signal."""
        Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        self._told.clear()
        self._tell("asked")
        if not self._told.wait(self._word_s):
            self._stop()

    def hear(self, command: str) -> None:
        """Takes a command of the launcher; a warning is said again and again, so one from before is no answer."""
        if command in ("leave", "stop"):
            self._told.set()
