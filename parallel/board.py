"""Where ranks write what they are at, so that others read it while they are stuck: a folder, or the ranks' store."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from meshwright.parallel.keyed import BOARD_KEY, Keyed

__all__ = ["Board", "FolderBoard", "RecordedBoard", "StoreBoard", "board_of"]


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
        key: of the ranks, without which texts of anybody count; that of the environment unless given.
    """

    def __init__(self, store: Any, key: str | None = None) -> None:
        self._store = store
        key = os.environ.get(BOARD_KEY) if key is None else key
        self._keyed = Keyed(bytes.fromhex(key), "ranks") if key else None  # names have the attempt
        self._known: set[int] = set()

    def put(self, rank: int, text: str) -> None:
        """Sets a key."""
        name = self._key(rank)
        self._store.set(name, text if self._keyed is None else self._keyed.signed(name, text))

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        """The keys that are there, and that ranks have written."""
        wanted = list(ranks)
        self._known.update(rank for rank in wanted if rank not in self._known and self._store.check([self._key(rank)]))
        known = [rank for rank in wanted if rank in self._known]
        values = self._store.multi_get([self._key(rank) for rank in known]) if known else []
        found = {rank: self._opened(self._key(rank), value) for rank, value in zip(known, values, strict=True)}
        return {rank: text for rank, text in found.items() if text is not None}

    def _opened(self, name: str, value: bytes) -> str | None:
        return value.decode() if self._keyed is None else self._keyed.opened(name, value)

    def _key(self, rank: int) -> str:
        return f"meshwright/progress/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


class RecordedBoard:
    """A board, beside which every rank keeps its last word in a folder that others need not see.

    Args:
        board: that ranks read.
        record: that is written only, for who looks after this rank.
    """

    def __init__(self, board: Board, record: FolderBoard) -> None:
        self._board, self._record = board, record

    def put(self, rank: int, text: str) -> None:
        """Replaces the text; a record that cannot be written silences nobody."""
        self._board.put(rank, text)
        with suppress(OSError):
            self._record.put(rank, text)

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        """What the board has."""
        return self._board.read(ranks)


def board_of(meeting: str | None, run_dir: Path | None, store: Callable[[], Any]) -> Board:
    """A board that all ranks of a job see for certain: the way by which they met is one.

    A run directory is none: its path is alike on all hosts, what lies there need not be.

    Args:
        meeting: `init_method` of the ranks.
        run_dir: of a launched job, for the record.
        store: gives a connection to the ranks' store.
    """
    met = None
    if meeting is not None and meeting.startswith("file://"):
        met = Path(meeting.removeprefix("file://"))
        if run_dir is not None and met.is_relative_to(run_dir.absolute()):
            return FolderBoard(run_dir / "ranks")
    board = StoreBoard(store()) if met is None else FolderBoard(Path(f"{met}-progress"))
    return board if run_dir is None else RecordedBoard(board, FolderBoard(run_dir / "ranks"))
