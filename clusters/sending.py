"""A run directory that launcher and node do not share: the node makes its own and sends what is written there.

Logs and metrics travel as they grow; other results at the end. What is kept on the launcher's side is `Keeper`. A run
that is started again may have its ranks on other nodes: each sends only what is new, and that is added to the rest.
"""

import base64
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

__all__ = ["OF_RANK", "Keeper", "Sender", "make_run_dir"]

FOLDERS = ("logs", "errors", "ranks", "private")
"""Folders of a run directory."""

OF_RANK = re.compile(r"(?:logs/rank-|errors/rank-|hang/fr-rank-|ranks/)([0-9]+)")
"""Begin of names of files that one rank writes."""

_METRICS = "metrics.jsonl"
_GROWING = ("logs/*.log", "nodes/*.jsonl", _METRICS)
_LAST = ("errors/*.json", "hang/*.json", "ranks/*/error.json", "ranks/*/progress.json", "*.png", "trace.json")
_ACCEPTED = re.compile(
    r"logs/[A-Za-z0-9._-]+\.log|nodes/[A-Za-z0-9._-]+\.jsonl|(errors|hang)/[a-z0-9-]+\.json"
    r"|ranks/[0-9]+/(error|progress)\.json|metrics\.jsonl|trace\.json|[a-z]+\.png"
)
_PART_BYTES = 1 << 18
_MAX_FILE_BYTES = 1 << 30
_EVERY_S = 0.2


def make_run_dir(run_dir: Path, files: Mapping[str, str]) -> None:
    """Makes a run directory on this machine that only this user can read.

    Args:
        run_dir: where.
        files: name -> text of files that ranks read there.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(mode=0o700, exist_ok=True)
    for name in FOLDERS:
        (run_dir / name).mkdir(mode=0o700, exist_ok=True)
    for name, text in files.items():
        with os.fdopen(
            os.open(run_dir / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w"
        ) as out:
            out.write(text)


class Sender:
    """Sends what grows in a run directory, in parts of {path, at, data, grows}.

    Args:
        run_dir: of this machine.
        tell: sends an event.
        ranks: of this node; only their files are sent, and of all files only what is new. None sends all that there is.
    """

    def __init__(self, run_dir: Path, tell: Callable[..., None], *, ranks: Collection[int] | None = None) -> None:
        self._run_dir, self._tell, self._ranks = run_dir, tell, ranks
        held = {} if ranks is None else {name: path.stat() for name, path in self._files(_GROWING + _LAST)}
        self._sent = {name: found.st_size for name, found in held.items()}
        self._old = {name: (found.st_ino, found.st_mtime_ns, found.st_size) for name, found in held.items()}
        self._stop = Event()
        self._thread = Thread(target=self._follow, name="sender", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._send_grown()

    def finish(self) -> None:
        """Sends the rest."""
        self._stop.set()
        self._thread.join()
        self._send_grown()
        for name, path in self._files(_LAST):
            with suppress(OSError):
                found = path.stat()
                if self._old.get(name) != (found.st_ino, found.st_mtime_ns, found.st_size):
                    self._sent[name] = 0
                    self._send(name, path, grows=False)

    def _files(self, patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
        paths = [path for pattern in patterns for path in sorted(self._run_dir.glob(pattern))]
        named = [(path.relative_to(self._run_dir).as_posix(), path) for path in paths]
        return [(name, path) for name, path in named if self._is_own(name)]

    def _is_own(self, name: str) -> bool:
        found = OF_RANK.match(name)
        return self._ranks is None or found is None or int(found[1]) in self._ranks

    def _send_grown(self) -> None:
        for name, path in self._files(_GROWING):
            with suppress(OSError):  # gone again, or not ours to read
                self._send(name, path, grows=True)

    def _send(self, name: str, path: Path, *, grows: bool) -> None:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._sent.get(name, 0):
                self._sent[name] = 0  # it was written anew
            file.seek(self._sent.get(name, 0))
            while data := file.read(_PART_BYTES):
                at = self._sent.get(name, 0)
                self._tell("data", path=name, at=at, data=base64.b64encode(data).decode(), grows=grows)
                self._sent[name] = at + len(data)


class Keeper:
    """Writes what nodes send into the launcher's run directory: what grows is added to what earlier starts sent.

    Args:
        run_dir: of the launcher.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._shift: dict[str, int] = {}  # from bytes of the node's file to those of ours

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one part; a path that is none of a run's results is not written."""
        name, at = str(event["path"]), int(event["at"])
        if not _ACCEPTED.fullmatch(name) or not 0 <= at < _MAX_FILE_BYTES:
            return
        path = self._run_dir / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as out:
            data = base64.b64decode(event["data"])
            if event.get("grows") and name not in self._shift:
                self._shift[name] = 0 if at == 0 and _is_anew(name, out, data) else _end_of(out, at) - at
            to = max(0, at + self._shift.get(name, 0))
            if at == 0:
                out.truncate(to)
            out.seek(to)
            out.write(data)


def _is_anew(name: str, file: BinaryIO, data: bytes) -> bool:
    """Whether a node's file stands for ours: counters of a node have all that it has; a training that goes on from a
    checkpoint writes its metrics again from the first step."""
    first = data.partition(b"\n")[0]
    return name.startswith("nodes/") or (name == _METRICS and file.read(len(first)) == first)


def _end_of(file: BinaryIO, at: int) -> int:
    """Where a file ends; before the first line of another node a torn one is ended."""
    size = file.seek(0, os.SEEK_END)
    if size and at == 0:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file.tell() if at == 0 else size
