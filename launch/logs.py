"""Output of ranks: each writes its own file, and the launcher follows them all into one stream of clean lines.

A line is whole, without control sequences, of a progress bar only the last state.
"""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["LogTail"]

_MAX_LINE_BYTES = 1 << 20


class LogTail:
    """Follows one file while it grows; whole lines only, until it is closed.

    Args:
        path: the file, which need not exist yet.
        emit: called with each line, without its end.
    """

    def __init__(self, path: Path, emit: Callable[[bytes], None]) -> None:
        self._path = path
        self._emit = emit
        self._file: int | None = None
        self._rest = b""

    def read(self) -> bool:
        """Hands on what has been written since; tells whether there was anything."""
        if self._file is None:
            try:
                self._file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError:
                return False
        data = os.read(self._file, 1 << 20)
        if not data:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._emit(line)
        return True

    def close(self) -> None:
        """Reads to the end, hands on an unfinished line, and lets the file go."""
        while self.read():
            pass
        if self._rest:
            self._emit(self._rest)
            self._rest = b""
        if self._file is not None:
            os.close(self._file)
            self._file = None
