"""Directories of checkpoints on disk: whole or absent.

    .step-00000100.partial   being written                   ignored, swept at the next start
    step-00000100            whole, by one atomic rename     holds manifest.json: sizes and CRC-32 of all files
    .step-00000050.deleting  being removed                   ignored, swept at the next start

Everything is flushed to the disk before the rename, and the rename before older ones go. No torch here.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

__all__ = [
    "MANIFEST",
    "Snapshot",
    "damaged_file",
    "describe_files",
    "find_newest",
    "partial_path",
    "prune",
    "read_snapshot",
    "seal",
    "sweep",
    "write_durably",
]

MANIFEST = "manifest.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Snapshot:
    """One whole checkpoint.

    Args:
        path: its directory.
        step: optimizer steps it has seen.
        manifest: what the training program noted beside it.
    """

    path: Path
    step: int
    manifest: Mapping[str, Any]


def partial_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole.

    >>> partial_path(Path("c"), 7).name
    '.step-00000007.partial'
    """
    return directory / f".{_PREFIX}{step:08d}.partial"


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of files, read back from the disk."""
    return {name: {"bytes": (folder / name).stat().st_size, "crc32": _crc32(folder / name)} for name in names}


def write_durably(path: Path, text: str) -> None:
    """Writes a small file and waits until the disk has it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal(partial: Path, step: int, manifest: Mapping[str, Any]) -> Snapshot:
    """Turns a completely written directory into a checkpoint by writing its manifest and renaming it.

    Args:
        partial: the directory; every file in it is already flushed.
        step: names the checkpoint.
        manifest: JSON values; must hold "files" as `describe_files` gives them.
    """
    write_durably(partial / MANIFEST, json.dumps({"step": step, **manifest}))
    _flush_folder(partial)
    final = partial.parent / f"{_PREFIX}{step:08d}"
    if final.exists():
        _remove(final)
    partial.rename(final)
    _flush_folder(final.parent)
    return Snapshot(final, step, manifest)


def read_snapshot(path: Path) -> Snapshot | str:
    """The checkpoint in a directory, or why it is not whole (sizes are checked, contents are not)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, step = dict(manifest["files"]), int(manifest["step"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, facts in files.items():
        if not (path / name).is_file():
            return f"its file {name} is missing"
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            return f"its file {name} has {size} bytes instead of {facts['bytes']}"
    return Snapshot(path, step, manifest)


def damaged_file(snapshot: Snapshot, names: Iterable[str]) -> str | None:
    """The first of `names` whose content is not what was written, or None."""
    for name in names:
        if _crc32(snapshot.path / name) != snapshot.manifest["files"][name]["crc32"]:
            return name
    return None


def find_newest(directory: Path, say: Callable[[str], None]) -> list[Snapshot]:
    """Whole checkpoints, newest first; each directory that is not one is named to `say`."""
    found: list[Snapshot] = []
    for path in sorted(directory.glob(f"{_PREFIX}*"), reverse=True):
        snapshot = read_snapshot(path)
        if isinstance(snapshot, str):
            say(f"checkpoint {path} is skipped: {snapshot}")
        else:
            found.append(snapshot)
    return found


def prune(directory: Path, keep: int) -> None:
    """Removes all but the `keep` newest whole checkpoints."""
    for snapshot in find_newest(directory, say=lambda _: None)[keep:]:
        _remove(snapshot.path)


def sweep(directory: Path) -> None:
    """Removes what interrupted saves and removals left behind."""
    for path in [*directory.glob(f".{_PREFIX}*.partial"), *directory.glob(f".{_PREFIX}*.deleting")]:
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Makes a checkpoint absent by one rename, then frees its space."""
    doomed = path.parent / f".{path.name}.deleting"
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = crc32(block, value)
    return value
