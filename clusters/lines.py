"""Messages as lines of a file that others read while it grows: a line is whole or not there."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from meshwright.clusters.descriptors import is_full

__all__ = ["Lines", "Tail", "write_all"]


class Tail:
    """Whole lines that were added to a file since the last look; one that is torn is skipped, and said.

    Args:
        path: the file, which need not exist yet.
        word: what every message has.
    """

    def __init__(self, path: Path, word: str) -> None:
        self._path, self._word, self._at = path, word, 0

    def read(self) -> list[dict[str, Any]]:
        """The messages that are new.

        Raises:
            OSError: when too many files are open.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError as error:
            if is_full(error):
                raise  # that too many files are open is no lack of lines
            return []
        whole, _, _ = data.rpartition(b"\n")
        self._at += len(whole) + 1 if whole else 0
        return [message for line in whole.split(b"\n") if line and (message := self._message(line)) is not None]

    def _message(self, line: bytes) -> dict[str, Any] | None:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and self._word in found:
                return found
        sys.stderr.write(f"meshwright: {self._path}: a line is torn, and skipped: {line[:80]!r}\n")
        return None


class Lines:
    """Adds lines to a file of which this is the only writer; what finds no room waits, in its order.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._waiting: list[bytes] = []

    def add(self, message: Mapping[str, Any]) -> bool:
        """Adds one line; tells whether it is there, and not only waits."""
        with self._lock:
            self._waiting.append(json.dumps(message).encode() + b"\n")
        return self.flush()

    def flush(self) -> bool:
        """Writes what waits, as far as there is room; tells whether nothing waits any more."""
        with self._lock, suppress(OSError):
            if self._waiting:
                write_all(self._path, self._waiting)
        return not self._waiting


def write_all(path: Path, lines: list[bytes]) -> None:
    """Takes lines out of a list as they are written; of one that cannot be written whole nothing stays.

    Raises:
        OSError: when one could not be written.
    """
    held = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        while lines:
            size, line = os.fstat(held).st_size, lines[0]
            try:
                while line:
                    line = line[os.write(held, line) :]
            except OSError:
                os.ftruncate(held, size)
                raise
            del lines[0]
    finally:
        os.close(held)
