"""Who asks a node's driver, and who forks there, take turns: a fork in the middle of a question could never ask one."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from types import TracebackType

__all__ = ["Turns"]


class Turns:
    """One at a time.

    >>> turns = Turns()
    >>> with turns, turns.still(0.01) as free:
    ...     free
    False
    """

    def __init__(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @contextmanager
    def still(self, timeout_s: float) -> Iterator[bool]:
        """Lets nobody ask meanwhile.

        Args:
            timeout_s: a driver that does not answer for so long is not waited for, and False is given.
        """
        held = self._lock.acquire(timeout=timeout_s)
        try:
            yield held
        finally:
            if held:
                self._lock.release()
