"""Where ranks write what they are at, so that others read it while they are stuck: a folder, or the ranks' store."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Board", "FolderBoard", "StoreBoard"]


class Board(Protocol):
    """One text per rank; the last one counts."""

    def put(self, rank: int, text: str) -> None:
        """Replaces the text of a rank."""
        ...

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        """The texts of those ranks that have written one."""
        ...


class FolderBoard:
    """One small file per rank; reading one needs nobody's help.

    Args:
        folder: that all ranks see; holds RANK/progress.json.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, rank: int, text: str) -> None:
        """Replaces a file at once, so that nobody reads half of it."""
        path = self._path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        os.replace(part, path)

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        """The files that are there."""
        found = {}
        for rank in ranks:
            with suppress(OSError, UnicodeDecodeError):
                found[rank] = self._path(rank).read_text()
        return found

    def _path(self, rank: int) -> Path:
        return self._folder / str(rank) / "progress.json"


class StoreBoard:
    """The store through which ranks found each other.

    Args:
        store: of torch; a connection of its own, since the main thread may be waiting on the other one.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._known: set[int] = set()

    def put(self, rank: int, text: str) -> None:
        """Sets a key."""
        self._store.set(self._key(rank), text)

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        """The keys that are there."""
        wanted = list(ranks)
        self._known.update(rank for rank in wanted if rank not in self._known and self._store.check([self._key(rank)]))
        known = [rank for rank in wanted if rank in self._known]
        values = self._store.multi_get([self._key(rank) for rank in known]) if known else []
        return {rank: value.decode() for rank, value in zip(known, values, strict=True)}

    def _key(self, rank: int) -> str:
        return f"meshwright/progress/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"
