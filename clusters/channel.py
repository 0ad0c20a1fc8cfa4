"""The line between launcher and agent: JSON objects, one a line, over the agent's standard streams.

The agent takes both streams for itself and leaves its children /dev/null and its own log instead.
"""

import json
import os
import select
import sys
from collections.abc import Iterator
from threading import Lock
from typing import Any, Protocol

__all__ = ["Channel", "Line"]


class Line(Protocol):
    """An agent's end of some line to its launcher."""

    def has_words(self, timeout_s: float) -> bool:
        """Whether the launcher says something before so long."""

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the launcher says, until it is gone."""

    def tell(self, event: str, **fields: object) -> None:
        """Sends one event."""


class Channel:
    """An agent's end of the line.

    Whoever constructs it gives up standard input and output: what the process reads is empty from now on, and what
    it prints goes to standard error.
    """

    def __init__(self) -> None:
        self._input = os.fdopen(os.dup(0), "rb")
        self._output = os.dup(1)
        self._lock = Lock()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        os.register_at_fork(after_in_child=self._leave)

    def _leave(self) -> None:
        """Gives the line up, in a fork: the launcher sees it end with the agent."""
        null = os.open(os.devnull, os.O_RDWR)
        for each in (self._input.fileno(), self._output):
            os.dup2(null, each, inheritable=False)
        os.close(null)

    def has_words(self, timeout_s: float) -> bool:
        """Whether there is a line, or the end, before so long."""
        return bool(select.select([self._input], [], [], timeout_s)[0])

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the launcher says, until it closes its end or dies, in the middle of a line too."""
        for line in self._input:
            if line.endswith(b"\n"):
                yield json.loads(line)

    def tell(self, event: str, **fields: object) -> None:
        """Sends one event; a launcher that is gone is no error, the end of input deals with it."""
        line = json.dumps({"event": event, **fields}) + "\n"
        with self._lock:
            try:
                left = memoryview(line.encode())
                while left:  # a pipe takes long lines in parts
                    left = left[os.write(self._output, left) :]
            except OSError:
                sys.stderr.write(f"nobody listens to: {line}")
