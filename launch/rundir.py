"""The run directory: who made it, what lies where, and writing into it so that a file is whole or absent.

runs/<name>/<run_id>/  job.yaml job.json plan.json exit.json merged.log metrics.jsonl loss.png
                       page.html trace.json timeline.png
                       logs/ errors/ ranks/ private/
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meshwright.launch.exits import Exit
from meshwright.parallel.errors import MeshwrightError

__all__ = [
    "ASKED_FILE",
    "EXCLUDED_FILE",
    "HEALTH_FILE",
    "RunDirError",
    "create_run_dir",
    "make_run_id",
    "write_json",
    "write_text",
]

EXCLUDED_FILE = "excluded.json"
"""Nodes that a run went on without: who, why, when; absent where there are none."""

HEALTH_FILE = "health.jsonl"
"""Faults of machines that were seen while ranks ran: node, what, when; absent where there are none."""

ASKED_FILE = "asked.json"
"""Job and plan of an elastic run in a queue, for the most nodes it may get; job.json has those it got."""

_FOLDERS = ("logs", "errors", "ranks", "private")


class RunDirError(MeshwrightError):
    """A run directory that cannot be made or written."""

    exit_code = int(Exit.IO)


def make_run_id(now_unix_s: float | None = None, token: str | None = None) -> str:
    """A sortable id: UTC time, and six random hexadecimal digits against launches of the same second.

    >>> make_run_id(0.0, "a1b2c3")
    '19700101T000000Z-a1b2c3'
    """
    now = time.gmtime(now_unix_s)
    return f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{token or secrets.token_hex(3)}"


def create_run_dir(path: Path, folders: Sequence[str] = _FOLDERS) -> None:
    """Makes a run directory that only this user can read, with its folders.

    Raises:
        RunDirError: when it exists already, or cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
        for name in folders:
            (path / name).mkdir(mode=0o700)
    except FileExistsError as error:
        if error.filename is not None and Path(error.filename) != path:
            raise RunDirError(_cannot(path, error)) from error
        raise RunDirError(f"logs.dir: {path} exists already; choose another --run-id, or leave it out") from error
    except OSError as error:
        raise RunDirError(_cannot(path, error)) from error


def _cannot(path: Path, error: OSError) -> str:
    return (
        f"logs.dir: the run directory {path} cannot be made: {error.strerror} ({error.filename}); "
        "set logs.dir to a directory that you can write"
    )


def write_text(path: Path, text: str, *, part: str = "part", if_wanted: Callable[[], bool] = lambda: True) -> None:
    """Writes a file that is whole or absent, also when the machine stops.

    Args:
        path: the file.
        text: of it.
        part: ends the name under which it is written first; of each writer where there may be several.
        if_wanted: asked once all is written, whether it is to take the place of what is there.

    Raises:
        RunDirError: when it cannot be written.
    """
    written = path.with_name(f".{path.name}.{part}")
    try:
        with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path) if if_wanted() else written.unlink()
    except OSError as error:
        raise RunDirError(f"{path} cannot be written: {error.strerror}; free some space, or set logs.dir") from error


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, whole or absent."""
    write_text(path, json.dumps(value, indent=2) + "\n")
