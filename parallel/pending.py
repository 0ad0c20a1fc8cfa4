"""A collective in flight, which has a name while this rank waits for it."""

from collections.abc import Callable
from typing import Any

from meshwright.parallel.progress import Call, Waiting

__all__ = ["Pending"]


class Pending:
    """A collective in flight; `wait` returns when its result may be used, and then calls `told`, if there is one.

    Args:
        work: torch's own; None where it is done.
        call: what waiting is called; None where the caller says what it waits for.
    """

    def __init__(self, work: Any | None, call: Call | None = None) -> None:
        self.told: Callable[[], None] | None = None
        self.work = work
        self._call = call
        self._number = 0 if call is None else call.begun()

    def finish(self) -> None:
        """`wait` for what is known to be done: nobody needs to know of it."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def wait(self) -> None:
        """Blocks until the collective is done; a collective over one rank is done at once."""
        if self.work is None:
            return
        if self._call is None:
            self.work.wait()
        else:
            with Waiting(self._call, self._number):
                self.work.wait()
        self.work = None
        if self.told is not None:
            self.told()
