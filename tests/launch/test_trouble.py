"""What the system refuses is told as what it was, and stands in the exit record of the run."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.request import Program, StartRequest
from meshwright.launch.follow import Run, follow
from meshwright.launch.rundir import RunDirError, create_run_dir
from meshwright.launch.supervise import Interrupts
from meshwright.launch.trouble import trouble
from meshwright.parallel.errors import MeshwrightError


def failed(number: int, about: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), about)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (failed(errno.ENOSPC), RunDirError, "its logs cannot be written: No space left on device; free some space"),
        (failed(errno.ENOENT, "/r/logs/x"), RunDirError, "its logs cannot be written: No such file or directory (/r/l"),
        (failed(errno.EMFILE, "/r/logs/x"), UnavailableError, "ended: /r/logs/x: Too many open files; .*`ulimit -n`"),
        (failed(errno.ENFILE), UnavailableError, "Too many open files in system; this machine"),
        (failed(errno.ENOMEM), UnavailableError, "Cannot allocate memory; this machine has no memory"),
        (failed(errno.EAGAIN), UnavailableError, "no more processes can be started here"),
        (failed(errno.ENOENT, "mpiexec"), UnavailableError, "mpiexec: No such file or directory; is it installed"),
        (failed(errno.ECONNRESET), UnavailableError, "the run was ended: Connection reset by peer$"),
        (OSError("of a library"), UnavailableError, "the run was ended: of a library$"),
    ],
)
def test_each_refusal_is_told_as_what_it_was(error: OSError, kind: type[MeshwrightError], words: str) -> None:
    told = trouble(Path("/r"), error)
    assert type(told) is kind
    pattern = words.replace("(", r"\(")
    with pytest.raises(kind, match=pattern):
        raise told
    assert ("free some space" in str(told)) == (kind is RunDirError)


class _Full:
    """A started run whose next events cannot be read."""

    done = False

    def __init__(self, error: Exception) -> None:
        self._error, self.killed = error, False

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        if self.killed:
            return []
        raise self._error

    def stop(self) -> None:
        raise AssertionError("it is killed at once")

    def kill(self) -> None:
        self.killed = True


def run_of(folder: Path) -> Run:
    create_run_dir(folder / "r1")
    request = StartRequest("j", "r1", folder / "r1", Program(("x",), folder), num_nodes=2)
    logs = SimpleNamespace(prefix="{rank}", keep_attempts=1)
    job: Any = SimpleNamespace(train=None, logs=logs)
    return Run(job, plan_local(request, Machine("box", 2)), None, ("hunter22",), 1.0)


def raising(error: Exception) -> Callable[[object, object], Any]:
    def start(state: object, interrupts: object) -> Any:
        raise error

    return start


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UnavailableError("Ray did not place hunter22"), 69, "Ray did not place ***"),
        (failed(errno.ENOENT, "mpiexec"), 69, "mpiexec: No such file or directory"),
        (ZeroDivisionError("ours"), 70, "ours"),
    ],
)
def test_a_run_that_cannot_be_started_has_a_record_that_says_why(
    tmp_path: Path, error: Exception, code: int, words: str
) -> None:
    with pytest.raises((MeshwrightError, ZeroDivisionError)):
        follow(run_of(tmp_path), raising(error))
    told = json.loads((tmp_path / "r1/exit.json").read_text())
    assert (told["state"], told["exit_code"], told["attempts"]) == ("failed", code, 0)
    assert words in told["reason"]


def test_a_run_that_cannot_be_followed_is_ended_and_recorded(tmp_path: Path) -> None:
    handle = _Full(failed(errno.EMFILE))
    with pytest.raises(UnavailableError, match="Too many open files"):
        follow(run_of(tmp_path), lambda *_: handle)
    assert handle.killed
    assert json.loads((tmp_path / "r1/exit.json").read_text())["exit_code"] == 69


def test_a_disk_that_is_full_is_said_though_no_record_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)

    def full(*_: object) -> None:
        raise failed(errno.ENOSPC)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirError, match="its logs cannot be written: No space left"):
        follow(run, lambda *_: _Full(failed(errno.ENOSPC)))
    assert not (tmp_path / "r1/exit.json").exists()


def test_a_run_that_cannot_be_had_when_somebody_has_interrupted_it_is_interrupted(tmp_path: Path) -> None:
    def start(state: object, interrupts: Interrupts) -> Any:
        interrupts.numbers.append(signal.SIGINT)
        raise UnavailableError("Ray did not place 3 nodes")

    outcome = follow(run_of(tmp_path), start)
    assert (outcome.state, outcome.exit_code) == ("interrupted", 130)
