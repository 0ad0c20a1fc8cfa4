"""A forked rank sees what an executed one would, is forked from what computes nothing, and leaves nothing behind."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from meshwright.parallel import forking, forks
from meshwright.parallel.errors import RankError
from meshwright.parallel.ranks import RankPool

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")]

_WAIT_S = 120.0
_THREADS = "import torch; print(torch.get_num_threads())"


@pytest.fixture(scope="module", autouse=True)
def sources_of_their_own() -> Iterator[None]:
    """Other tests of this process keep ranks, and what these were forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORKS_ARE_TRIED", "1")
        patch.setattr(forks, "_LEARNED", {})  # a dozen of sources would import it
        yield


@pytest.fixture
def pool() -> Iterator[RankPool]:
    made = RankPool()
    yield made
    made.close()


class _Seen(NamedTuple):
    source: int
    torch_at: int
    threads_of_source: int
    source_began_cuda: bool
    modules: set[str]
    random: tuple[float, float, float]
    opened: list[str]


def _see() -> _Seen:
    source = os.getppid()
    opened = [os.readlink(f"/proc/self/fd/{each}") for each in (0, 1, 2)]
    threads = len(os.listdir(f"/proc/{source}/task"))
    drawn = random.random(), float(numpy.random.rand()), float(torch.rand(()))
    began = "libcuda.so" in Path(f"/proc/{source}/maps").read_text()
    return _Seen(source, id(torch.Tensor), threads, began, set(sys.modules), drawn, opened)


def _call(pool: RankPool, function: Any, *args: Any, ranks: int = 1) -> list[Any]:
    return pool.run(function, ranks, args, timeout_s=60)


def test_ranks_of_all_starts_are_forks_of_one_process_that_has_imported_and_nothing_else(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # with more, OpenBLAS has threads from the start, and ends them in forks
    found = _call(pool, _see, ranks=2)
    pool.close()
    found += _call(pool, _see, ranks=2)
    assert len({each.source for each in found}) == 1
    assert found[0].source != os.getpid()
    assert len({each.torch_at for each in found}) == 1, "imported by each for itself, it would lie elsewhere in each"
    assert {each.threads_of_source for each in found} == {1}
    assert not any(each.source_began_cuda for each in found)
    assert all("meshwright.parallel.ranks" in each.modules for each in found), "what the caller has imported"
    assert [len(set(drawn)) for drawn in zip(*(each.random for each in found), strict=True)] == [4, 4, 4]
    assert {each.opened[0] for each in found} == {os.devnull}
    assert len({each.opened[2] for each in found}) == 4


def _import_once(name: str) -> bool:
    """Whether a module was there already."""
    there = name in sys.modules
    __import__(name)
    return there


def test_what_one_rank_imported_comes_with_those_after_it(pool: RankPool) -> None:
    pytest.importorskip("transformers")
    name = "transformers.models.xlnet.configuration_xlnet"
    assert name not in sys.modules
    assert _call(pool, _import_once, name) == [False]
    assert _call(pool, _import_once, name, ranks=2) == [True, True]


def _meet(variable: str) -> tuple[int, str | None, int]:
    return os.getppid(), os.environ.get(variable), torch.get_num_threads()


def test_variables_that_are_read_late_reach_a_fork_and_others_start_another_source(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _call(pool, _meet, "NCCL_DEBUG")[0]
    pool.close()
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert _call(pool, _meet, "NCCL_DEBUG")[0] == (first[0], "INFO", first[2])
    pool.close()
    monkeypatch.delenv("NCCL_DEBUG")
    assert _call(pool, _meet, "NCCL_DEBUG")[0] == first
    pool.close()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    source, *seen = _call(pool, _meet, "OMP_NUM_THREADS", ranks=2)[1]
    alone = subprocess.run([sys.executable, "-c", _THREADS], check=True, capture_output=True, text=True).stdout
    assert source != first[0]
    assert seen == ["2", int(alone)]
    assert not Path(f"/proc/{first[0]}").exists(), "one without ranks is not kept"


def test_a_source_lives_as_long_as_its_ranks(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _call(pool, _meet, "ANY", ranks=1)
    monkeypatch.setenv("ANY", "new")
    second = _call(pool, _meet, "ANY", ranks=2)
    assert second[0] == first[0]
    assert second[1][:2] != first[0][:2]
    assert second[1][1] == "new"


def _say() -> None:
    sys.stdout.write("of a rank\n")
    sys.stdout.flush()


def test_ranks_work_where_their_caller_does_and_print_to_its_stderr(
    pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _call(pool, os.getpid)  # torch itself cannot be imported from a folder that was deleted
    pool.close()
    folder = tmp_path / "soon gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert _call(pool, os.readlink, "/proc/self/cwd") == [f"{folder} (deleted)"]
    _call(pool, _say)
    assert capfd.readouterr() == ("", "of a rank\n")


def test_cores_of_the_caller_are_those_of_its_ranks(pool: RankPool) -> None:
    whole = os.sched_getaffinity(0)
    _call(pool, os.getpid)
    os.sched_setaffinity(0, {min(whole)})
    try:
        cores = _call(pool, os.sched_getaffinity, 0, ranks=2)
    finally:
        os.sched_setaffinity(0, whole)
    assert cores == [whole, {min(whole)}]


def _end_the_source() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def test_the_end_of_the_source_ends_its_ranks_and_the_next_call_has_another(pool: RankPool) -> None:
    words = r"rank \d died with the end of what forked it, with signal 9 \(SIGKILL\)"
    with pytest.raises(RankError, match=words):
        _call(pool, _end_the_source, ranks=2)
    assert len(_call(pool, _see, ranks=2)) == 2


def test_imports_that_fail_are_told(pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('no torch today')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *map(os.path.abspath, sys.path)]))
    words = r"(?s)no rank could be started: the process that forks ranks ended with exit code 1\n.*no torch today"
    with pytest.raises(RankError, match=words):
        _call(pool, os.getpid)
    monkeypatch.undo()
    assert _call(pool, os.getpid) != [os.getpid()]


def test_what_takes_too_long_to_import_is_ended(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_IMPORT_S", 0.0)
    monkeypatch.setenv("ANY", "slow")
    with pytest.raises(RankError, match="no rank could be started: torch was not imported within 0 s"):
        _call(pool, os.getpid)


def test_a_fork_that_the_kernel_refuses_is_told(
    pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "import os", "def fork(): raise OSError('no room for a process')", "os.fork = fork"
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *map(os.path.abspath, sys.path)]))
    with pytest.raises(RankError, match="no rank could be started: no room for a process"):
        _call(pool, os.getpid)


_CALLER = """
import os, sys, time
from pathlib import Path
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks
def wait(folder):
    (Path(folder) / f"rank-{os.getpid()}").write_text(str(os.getppid()))
    time.sleep(600)
folder, way = sys.argv[1:]
run_ranks(os.getpid, Mesh(dp=2))
if way == "with a child":  # it holds all that its parent has opened
    child = os.fork()
    if not child:
        time.sleep(600)
        os._exit(0)
    (Path(folder) / "child").write_text(str(child))
try:
    run_ranks(wait, Mesh(dp=2), folder)
except KeyboardInterrupt:
    (Path(folder) / "interrupted").write_text(str(run_ranks(os.getppid, Mesh(dp=1))[0]))
    time.sleep(600)
"""


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _waiting(folder: Path) -> set[int]:
    """Ranks of the caller, and what they were forked from, once all wait."""
    _wait_for(lambda: len(found := list(folder.glob("rank-*"))) == 2 and all(map(Path.read_text, found)), "no ranks")
    ranks = {int(each.name.partition("-")[2]): int(each.read_text()) for each in folder.glob("rank-*")}
    return {*ranks, *ranks.values()}


@pytest.mark.parametrize("way", ["alone", "with a child"])
def test_nothing_is_left_of_ranks_whose_caller_is_killed(way: str, tmp_path: Path) -> None:
    caller = subprocess.Popen([sys.executable, "-c", _CALLER, str(tmp_path), way])
    try:
        left = _waiting(tmp_path)
    finally:
        caller.kill()
        caller.wait()
    try:
        _wait_for(lambda: not any(map(_alive, left)), "a rank outlived its caller")
    finally:
        if way == "with a child":
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_ctrl_c_ends_ranks_and_what_forks_them_is_the_callers_to_keep(tmp_path: Path) -> None:
    caller = subprocess.Popen([sys.executable, "-c", _CALLER, str(tmp_path), "alone"], start_new_session=True)
    try:
        left = _waiting(tmp_path)
        os.killpg(caller.pid, signal.SIGINT)
        told = tmp_path / "interrupted"
        _wait_for(lambda: told.exists() and told.read_text(), "no interrupt")
        source = int(told.read_text())
        assert source in left
        assert not any(map(_alive, left - {source}))
    finally:
        caller.kill()
        caller.wait()
    _wait_for(lambda: not _alive(source), "it outlived its caller")


class _Told(NamedTuple):
    """An end of a rank as its parent would hear of it."""

    codes: list[int]

    def __enter__(self) -> "_Told":
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def send(self, code: int) -> None:
        self.codes.append(code)


def test_ends_that_are_told_while_others_are_being_told_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    host = forking._Host(None, 0, None)  # type: ignore[arg-type]
    host._ends = {number: _Told(codes) for number in (101, 102, 103)}  # type: ignore[misc]
    reaped: set[int] = set()

    def wait(process: int, options: int) -> tuple[int, int]:
        del options
        if process == 101 and not reaped:  # two more end, and the handler of signals is called again
            reaped.add(101)
            host._reap(os.WNOHANG)
            return process, 1 << 8
        if process in reaped:
            raise ChildProcessError
        reaped.add(process)
        return process, 0

    monkeypatch.setattr(os, "waitpid", wait)
    host._reap(os.WNOHANG)
    assert sorted(codes) == [0, 0, 1]
    assert not host._ends
