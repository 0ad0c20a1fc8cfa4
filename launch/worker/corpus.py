"""The documents a job trains on: text files, in an order that no machine changes.

Documents are ordered by a hash of their relative names, so that a cap in bytes and the split into training and
validation take a fair mixture of all folders. No torch: the launcher can look for missing files before it starts ranks.
"""

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from meshwright.launch.worker.errors import CorpusError, CorpusMissingError

__all__ = ["STDLIB", "Document", "find_files", "read_documents", "split_documents"]

STDLIB: Literal["python-stdlib"] = "python-stdlib"
"""Name of the corpus every machine has: the .py files of the interpreter's standard library."""

_NOT_STDLIB = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One text: a name that does not depend on where it lies, and its bytes."""

    name: str
    content: bytes


def find_files(files: str | Sequence[str]) -> list[tuple[str, Path]]:
    """Names and paths of a corpus, ordered by a hash of the name.

    Args:
        files: "python-stdlib", or file names and glob patterns (`**` goes into folders).

    Raises:
        CorpusMissingError: when a name or pattern matches no file.
    """
    found: dict[str, Path] = {}
    for pattern in [files] if isinstance(files, str) else files:
        found.update(_stdlib() if pattern == STDLIB else _matches(pattern))
    return sorted(found.items(), key=lambda item: _rank(item[0]))


def read_documents(files: str | Sequence[str], *, max_bytes: int | None = None) -> list[Document]:
    """Reads a corpus until `max_bytes`; the last document is cut there. Empty files are left out.

    Raises:
        CorpusMissingError: when a file cannot be found or read.
        CorpusError: when all files are empty.
    """
    documents: list[Document] = []
    left = max_bytes
    for name, path in find_files(files):
        if left is not None and left <= 0:
            break
        try:
            content = path.read_bytes()[:left]
        except OSError as error:
            raise CorpusMissingError(f"data.files: {path} cannot be read: {error.strerror}") from error
        left = None if left is None else left - len(content)
        if content:
            documents.append(Document(name, content))
    if not documents:
        raise CorpusError(f"data.files: {files!r} holds no text; all files are empty or data.max_bytes is 0")
    return documents


def split_documents(documents: Sequence[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Parts documents into (training, validation): no document lies in both, and neither part depends on a seed.

    Validation takes documents by a second hash of their names until it holds the fraction of bytes.

    >>> texts = [Document(name, b"x" * 10) for name in "abcd"]
    >>> [len(part) for part in split_documents(texts, 0.25)]
    [3, 1]

    Raises:
        CorpusError: when no document would be left to train on.
    """
    wanted = validation_fraction * sum(len(document.content) for document in documents)
    held_out: set[str] = set()
    filled = 0.0
    for document in sorted(documents, key=lambda each: _rank(f"validation {each.name}")):
        if filled >= wanted:
            break
        held_out.add(document.name)
        filled += len(document.content)
    training = [document for document in documents if document.name not in held_out]
    if not training:
        raise CorpusError(
            f"data.validation_fraction={validation_fraction} takes all {len(documents)} documents; "
            "split the corpus into more files, or set data.validation_fraction to 0"
        )
    return training, [document for document in documents if document.name in held_out]


def _rank(name: str) -> tuple[bytes, str]:
    return blake2b(name.encode(), digest_size=8).digest(), name


def _stdlib() -> dict[str, Path]:
    """Standard library without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    folders = [root]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_dir() and entry.name not in _NOT_STDLIB:
                folders.append(entry)
            elif entry.suffix == ".py" and entry.is_file():
                found[entry.relative_to(root).as_posix()] = entry
    return found


def _matches(pattern: str) -> dict[str, Path]:
    paths = {Path(path).as_posix(): Path(path) for path in glob(pattern, recursive=True) if Path(path).is_file()}
    if not paths:
        raise CorpusMissingError(
            f"data.files: {pattern!r} matches no file in {Path.cwd()}; "
            f"name existing text files or patterns such as 'corpus/**/*.txt', or use {STDLIB!r}"
        )
    return paths
