"""A run directory that launcher and node do not share: the node makes its own and sends what is written there.

Logs and metrics travel as they grow; other results at the end. What is kept on the launcher's side is `Keeper`.
"""

import base64
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

__all__ = ["Keeper", "Sender", "make_run_dir"]

FOLDERS = ("logs", "errors", "ranks", "private")
"""Folders of a run directory."""

_GROWING = ("logs/*.log", "nodes/*.jsonl", "metrics.jsonl")
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
    """Sends what grows in a run directory, in parts of {path, at, data}.

    Args:
        run_dir: of this machine.
        tell: sends an event.
    """

    def __init__(self, run_dir: Path, tell: Callable[..., None]) -> None:
        self._run_dir, self._tell = run_dir, tell
        self._sent: dict[str, int] = {}
        self._stop = Event()
        self._thread = Thread(target=self._follow, name="sender", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._send(_GROWING)

    def finish(self) -> None:
        """Sends the rest."""
        self._stop.set()
        self._thread.join()
        self._send(_GROWING + _LAST)

    def _send(self, patterns: tuple[str, ...]) -> None:
        for pattern in patterns:
            for path in sorted(self._run_dir.glob(pattern)):
                self._send_file(path, path.relative_to(self._run_dir).as_posix())

    def _send_file(self, path: Path, name: str) -> None:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._sent.get(name, 0):
                    self._sent[name] = 0  # it was written anew
                file.seek(self._sent.get(name, 0))
                while data := file.read(_PART_BYTES):
                    at = self._sent.get(name, 0)
                    self._tell("data", path=name, at=at, data=base64.b64encode(data).decode())
                    self._sent[name] = at + len(data)
        except OSError:
            return  # gone again, or not ours to read


class Keeper:
    """Writes what nodes send into the launcher's run directory.

    Args:
        run_dir: of the launcher.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one part; a path that is none of a run's results is not written."""
        name, at = str(event["path"]), int(event["at"])
        if not _ACCEPTED.fullmatch(name) or not 0 <= at < _MAX_FILE_BYTES:
            return
        path = self._run_dir / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_TRUNC if at == 0 else 0)
        with os.fdopen(os.open(path, flags, 0o600), "wb") as out:
            out.seek(at)
            out.write(base64.b64decode(event["data"]))
