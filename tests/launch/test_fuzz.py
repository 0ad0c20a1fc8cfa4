"""Ten thousand damaged inputs: refused in words and with a documented code, never a traceback or a started process.

What a case asks for is decided by a dry run; a launch of what that refuses must refuse as well, before it starts
anything. Programs, forks and connections of this process are taken away meanwhile, so the first of them is noticed.
`damage.case_of(NUMBER)` is the case that a failure names. `make test` takes the first thousand, `make wide` the rest.
"""

import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters import spawn
from meshwright.launch import cli
from meshwright.launch.exits import Exit
from tests.launch.damage import Case, case_of

QUICK, ALL, CHUNK = 1_000, 10_000, 250
REFUSED = {int(each) for each in Exit} - {Exit.SUCCESS, Exit.INTERNAL, Exit.PREEMPTED, Exit.TIMEOUT, Exit.HANG}
PLACE = re.compile(r"(?:[^\n]*:[1-9]\d*:[1-9]\d*|--set .*?): .+")
LONGEST_S = 20.0
# pipes of a process that never came are left to the collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class StartedError(BaseException):
    """A process or a connection that was begun; no handler of the command line takes it for an error of its own."""


class _NoProcess(subprocess.Popen):  # type: ignore[type-arg]
    """A class still, since others are derived from it when they are imported."""

    def __init__(self, *_: object, **__: object) -> None:
        raise StartedError

    def __del__(self, *_: object) -> None:
        return None


def _starts(*_: object, **__: object) -> Any:
    raise StartedError


def _asked(words: list[str], **__: object) -> "subprocess.CompletedProcess[str]":
    """The one program that a plan asks: which MPI an mpiexec belongs to."""
    if words[1:] != ["--version"]:
        raise StartedError
    return subprocess.CompletedProcess(words, 0, "mpiexec (Open MPI) 4.1.4", "")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory to be in, and nothing that can be started; the agent that is kept warm is none of a run's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(spawn, "keep_warm", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", _NoProcess)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", _asked)
    monkeypatch.setattr(socket, "create_connection", _starts)
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "execv", "execve", "execvp"):
        monkeypatch.setattr(os, name, _starts)
    return tmp_path


def _said(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int | None, str, str]:
    """Exit code (None: something was started), standard output and error, on streams as strict as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    try:
        code: int | None = cli.main(words)
    except StartedError:
        code = None
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="surrogateescape"))  # type: ignore[attr-defined]
    return code, texts[0], texts[1]


def _put(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        (folder / name).write_bytes(content)


def _faults(code: int | None, out: str, err: str, *, asked: bool) -> Iterator[str]:
    """What is wrong with an answer."""
    if code is None:
        if not asked:
            yield "it started something"
        return
    if code == 0:
        return
    if code not in REFUSED:
        yield f"the exit code is {code}"
    if "Traceback" in err or "this is a bug" in err or "Traceback" in out:
        yield "it is a traceback"
    if not err.strip():
        yield "nothing was said"
    if code == Exit.BAD_JOB and not PLACE.search(err):
        yield "no place is named"
    if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", err):
        yield "control characters reach the terminal"


def _tried(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    case = case_of(number)
    _put(case, folder)
    before = {path.name for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        for name, value in case.env.items():
            patch.setenv(name, value)
        start_s = time.monotonic()
        legal = False
        if case.words[0] == "launch" and "--dry-run" not in case.words:
            legal = _said([*case.words, "--dry-run"], patch)[0] == 0
        code, out, err = _said(case.words, patch)
        took_s = time.monotonic() - start_s
    found = list(_faults(code, out, err, asked=legal or case.words[0] == "doctor"))
    left = {path.name for path in folder.iterdir()} - before
    found += [f"it took {took_s:.1f} s"] if took_s > LONGEST_S else []
    found += [f"it left {sorted(left)}"] if left and code and not legal else []
    return [f"case {number} {case.words}: {fault}; {err.strip()[:300]}" for fault in found]


def _chunks(first: int, last: int) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("start", range(first, last, CHUNK))


def _all_of(start: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [each for number in range(start, start + CHUNK) for each in _tried(number, folder, monkeypatch)]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])


@_chunks(0, QUICK)
def test_a_damaged_input_is_refused_in_words(start: int, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _all_of(start, alone, monkeypatch)


@pytest.mark.slow
@pytest.mark.wide
@_chunks(QUICK, ALL)
def test_so_are_ten_thousand(start: int, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _all_of(start, alone, monkeypatch)
