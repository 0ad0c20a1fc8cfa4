"""When a run that somebody looks at is over: at once by its record, otherwise only if it stays so for a while."""

import time
from pathlib import Path

from meshwright.launch.runs import Known, Standing, fetch, forget_secrets, standing

__all__ = ["Looks"]

_ASK_S = 2.0
_SURE_LOOKS = 3  # a job that is just being queued again is nowhere for a moment


class Looks:
    """Looks at a run, not too often.

    Args:
        known: the run.
    """

    def __init__(self, known: Known) -> None:
        self._known, self._record = known, Path(known.run_dir, "exit.json")
        self._next_s, self._missed = 0.0, 0
        self._written = self.over = False

    def news(self) -> Standing | None:
        """How the run stands; None where it was looked at just now. One that is over leaves no secrets."""
        written, before = self._record.exists(), self._written
        self._written = written
        if (before or not written) and time.monotonic() < self._next_s:
            return None
        fetch(self._known)
        now = standing(self._known)
        self._missed = self._missed + 1 if now.over and not written else 0
        self.over = now.over and self._missed in (0, _SURE_LOOKS)
        self._next_s = time.monotonic() + _ASK_S
        if self.over:
            forget_secrets(self._known)
        return now

    def wait(self) -> Standing:
        """How the run stands, for sure."""
        now = self.news()
        while now is None or (now.over and not self.over):
            time.sleep(_ASK_S / 4)
            now = self.news()
        return now
