"""Output of ranks: each writes its own file, and the launcher follows them all into one stream of clean lines.

A line is whole, without control sequences, of a progress bar only the last state.
"""

import os
from collections.abc import Callable
from pathlib import Path

from meshwright.clusters.descriptors import is_full

__all__ = ["LogTail"]

_MAX_LINE_BYTES = 1 << 20
_PART_BYTES = 1 << 20


class LogTail:
    """Follows one file while it grows; whole lines only, until it is closed.

    Args:
        path: the file, which need not exist yet.
        emit: called with each line, without its end.
        keep: whether it stays open between two looks.
    """

    def __init__(self, path: Path, emit: Callable[[bytes], None], *, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        self._emit = emit
        self._file: int | None = None
        self._at = 0
        self._rest = b""

    def read(self) -> bool:
        """Hands on what has been written since; tells whether there was anything.

        Raises:
            OSError: when it cannot be read, or cannot be opened since too many files are open.
        """
        data = self._next()
        if not data:
            return False
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._emit(line)
        return True

    def _next(self) -> bytes:
        found = self._file
        if found is None:
            try:
                found = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError as error:
                if is_full(error):
                    raise
                return b""
        self._file = found if self._keep else None
        try:
            return os.pread(found, _PART_BYTES, self._at)
        finally:
            if not self._keep:
                os.close(found)

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
