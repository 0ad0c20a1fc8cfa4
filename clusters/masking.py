"""Secrets are masked by value: in what is shown, and in the files that ranks write themselves.

A rank writes straight into its log, as fast as it can. What it wrote is overwritten in place afterwards, with as many
bytes: nobody's place in the file moves, and nothing that is appended meanwhile is torn or lost.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from threading import Event, Thread
from typing import Any

__all__ = ["Concealer", "Mask", "conceal_while", "logs_of"]

_MASK = "***"
_FILLER = b"\x7f"  # is no text, so that it is left out where lines are shown; terminals show nothing for it
_SHORTEST = 4  # of several lines, one that is shorter says nothing
_WHOLE = ("errors/*.json", "ranks/*/error.json")
_PART_BYTES = 1 << 20
_EVERY_S = 1.0


def _words(values: Iterable[str]) -> list[str]:
    """The secrets in every form in which Python writes them, the longest first; of several lines, each is one."""
    plain = {line for value in values for line in _telling(value)}
    shown = plain | {form(line)[1:-1] for line in plain for form in (repr, ascii)}
    written = shown | {json.dumps(line, ensure_ascii=pure)[1:-1] for line in shown for pure in (False, True)}
    return sorted(written, key=len, reverse=True)


def _telling(value: str) -> list[str]:
    lines = [stripped for line in value.splitlines() if (stripped := line.strip())]
    return [line for line in lines if len(line) >= _SHORTEST or len(lines) == 1]


class Mask:
    """Replaces secrets in what is shown.

    Args:
        values: the secrets; of several lines, each line is one.

    >>> Mask(["hunter22"])("password=hunter22")
    'password=***'
    """

    def __init__(self, values: Iterable[str]) -> None:
        words = _words(values)
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        return self._pattern.sub(_MASK, text) if self._pattern else text

    def inside(self, value: Any) -> Any:
        """JSON-able values without secrets, whatever their text would look like in JSON.

        >>> Mask(['say "x"']).inside({"why": ['say "x"!', 3]})
        {'why': ['***!', 3]}
        """
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self(key): self.inside(each) for key, each in value.items()}
        return [self.inside(each) for each in value] if isinstance(value, list | tuple) else value


class Concealer:
    """Masks secrets in the files of a run that ranks, agents and setup scripts write themselves.

    Args:
        run_dir: of the run.
        values: the secrets.
        logs: patterns of files that grow.
    """

    def __init__(self, run_dir: Path, values: Iterable[str], *, logs: Sequence[str] = ("logs/*.log",)) -> None:
        known = list(values)
        self._growing = (*logs, "private/step/*.jsonl")
        words = [os.fsencode(word) for word in _words(known)]
        self._run_dir, self.mask = run_dir, Mask(known)
        self._pattern = re.compile(b"|".join(map(re.escape, words))) if words else None
        self._longest = max(map(len, words), default=0)
        self._known: dict[Path, int] = {}
        self._done: dict[Path, int] = {}  # to where secrets are masked that begin before

    def look(self) -> None:
        """Masks what was there at the look before: whoever follows a file has read it, and sees no half of a secret."""
        if self._pattern is None:
            return
        for path in self._files(self._growing):
            with suppress(OSError):
                before, self._known[path] = self._known.get(path, 0), path.stat().st_size
                if before > self._done.get(path, 0):
                    self._conceal(path, before)

    def finish(self) -> None:
        """Masks everything, once nobody writes any more."""
        if self._pattern is None:
            return
        for path in self._files(self._growing):
            with suppress(OSError):
                self._conceal(path, path.stat().st_size)
        for path in self._files(_WHOLE):
            with suppress(OSError):
                self._rewrite(path)

    def _files(self, patterns: Iterable[str]) -> list[Path]:
        found: list[Path] = []
        with suppress(OSError):  # a file system that fails for a moment ends no run
            found += (path for pattern in patterns for path in self._run_dir.glob(pattern) if not path.is_symlink())
        return found

    def _conceal(self, path: Path, end: int) -> None:
        """Overwrites secrets that begin before `end`, from where the last look ended."""
        at = max(0, self._done.get(path, 0) - self._longest)  # one may have begun there
        assert self._pattern is not None, "there are secrets"
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            while at < end:
                data = os.pread(file, min(_PART_BYTES, end - at) + self._longest, at)
                for found in self._pattern.finditer(data):
                    if at + found.start() >= end:
                        break
                    fill = _MASK.encode()[: len(found[0])].ljust(len(found[0]), _FILLER)
                    os.pwrite(file, fill, at + found.start())
                at += min(_PART_BYTES, end - at)
        finally:
            os.close(file)
        self._done[path] = end

    def _rewrite(self, path: Path) -> None:
        text = path.read_text(errors="surrogateescape")
        if self.mask(text) == text:
            return
        try:
            masked = json.dumps(self.mask.inside(json.loads(text)))
        except ValueError:  # a rank that was killed while it wrote
            masked = self.mask(text)
        part = path.with_name(f".{path.name}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(part, flags, 0o600), "w", errors="surrogateescape") as file:
            file.write(masked)
        os.replace(part, path)


def logs_of(node: Mapping[str, Any]) -> list[str]:
    """Patterns of what ranks and the agent of one node write, of all attempts."""
    return [*(f"logs/rank-{rank}.*" for rank in node["ranks"]), f"logs/*-{escape(node['name'])}.log"]


def conceal_while(concealer: Concealer, ended: Event) -> Thread:
    """Masks what ranks write, once a second until the end, in a thread that ends nothing by its errors."""

    def look() -> None:
        while not ended.wait(_EVERY_S):
            concealer.look()

    found = Thread(target=look, name="concealer", daemon=True)
    found.start()
    return found
