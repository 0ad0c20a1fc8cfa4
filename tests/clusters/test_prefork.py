"""A rank that is forked from its agent is like one that is executed, and dies with it as surely."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from meshwright.clusters import bootstrap
from meshwright.clusters.sweep import carriers, sweep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")

# holds a socket, handlers and threads like an agent; then ranks, which say what they see
_AGENT = """
import atexit, json, multiprocessing, os, signal, socket, sys, threading, time
from pathlib import Path
from meshwright.clusters.carrying import make_room
from meshwright.clusters.imports import Imports
from meshwright.clusters.prefork import Forks
make_room()
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
imports = Imports()
imports.begin()
atexit.register(print, "of the agent", flush=True)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR2, lambda *_: None)
held = socket.create_server(("127.0.0.1", 0)), *socket.socketpair()
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
threads, run_dir, workdir, *command = sys.argv[1:]
os.environ.update(OMP_NUM_THREADS=threads, MESHWRIGHT_NODE="0")
os.environ["MESHWRIGHT_IMPORTS"] = "json numpy no.such.module"
imports.await_torch()
imports.go_on(Path(workdir))
forks = Forks(imports)
forks.await_imports(lambda: False)
assert imports.why_not(command, Path(workdir)) == "", imports.why_not(command, Path(workdir))
sys.modules["numpy"].random.seed(5)
sys.modules["torch"].manual_seed(5)
os.environ["RANK"] = "1"
context = multiprocessing.get_context("fork")
def fork(run_dir, *words):
    os.environ["MESHWRIGHT_RUN_ID"] = os.path.basename(run_dir)
    with forks.together():
        rank = context.Process(target=forks.begin, args=(str(os.getpid()), run_dir, workdir, *command, *words))
        rank.start()
        time.sleep(0.2)
        assert os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "it waits for the others"
    rank.join()
    print(rank.exitcode, flush=True)
for line in sys.stdin if command[-1] == "ranked" else [json.dumps([run_dir])]:
    fork(*json.loads(line))
"""

_EXECUTING = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
threads, run_dir = sys.argv[2:4]
os.environ.update(RANK="1", OMP_NUM_THREADS=threads, MESHWRIGHT_RUN_ID=os.path.basename(run_dir), MESHWRIGHT_NODE="0")
words = [sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), *sys.argv[3:]]
print(subprocess.run(words, start_new_session=True).returncode)
"""

_RANK = """
import gc, json, multiprocessing, os, signal, stat, sys
shown = open("/proc/self/environ").read().split("\\0")
CARRIED = ("MESHWRIGHT_RUN_ID", "MESHWRIGHT_NODE", "RANK")
opened = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
seen = {
    "argv": sys.argv,
    "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "cwd": os.getcwd(),
    "path": sys.path[0],
    "neighbour": __import__("neighbour").VALUE,
    "leads": os.getpid() == os.getsid(0) == os.getpgid(0),
    "sockets": [each for each in opened if stat.S_ISSOCK(os.fstat(each).st_mode)],
    "stdin": os.fstat(0).st_rdev,
    "handlers": {str(each): str(signal.getsignal(each)) for each in signal.valid_signals()},
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    "process": (multiprocessing.current_process().name, multiprocessing.parent_process() is None),
    "method": multiprocessing.get_start_method(allow_none=True),
    "garbage": (gc.isenabled(), gc.get_threshold()),
    "random": sys.modules["numpy"].random.rand() if "numpy" in sys.modules else 0.0,
    "torch random": sys.modules["torch"].rand(1).item() if "torch" in sys.modules else 0.0,
    "threads": __import__("torch").get_num_threads() if "threads" in sys.argv else 0,
    "variables": {name: value for name, value in os.environ.items() if name not in ("LC_CTYPE", "MESHWRIGHT_IMPORTS")},
    "carried": sorted({f"{name}={os.environ[name]}" for name in CARRIED} & {*shown}),
}
json.dump(seen, open("seen.json", "w"))
print("to the log")
exec(sys.argv[1])
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    run_dir, workdir = tmp_path / f"run-{os.getpid()}-{time.time_ns()}", tmp_path / "work dir"
    (run_dir / "logs").mkdir(parents=True)
    _write_program(workdir)
    return run_dir, workdir


def _write_program(workdir: Path) -> None:
    workdir.mkdir()
    (workdir / "ranked.py").write_text(_RANK)
    (workdir / "neighbour.py").write_text("VALUE = 7\n")


def _start(
    way: str, folders: tuple[Path, Path], *words: str, threads: int = 1, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    run_dir, workdir = folders
    head = [_AGENT] if way == "fork" else [_EXECUTING, str(bootstrap.__file__)]
    command = [sys.executable, "-u", "-m", "ranked", *words]
    path = os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", *head, str(threads), str(run_dir), str(workdir), *command],
        env={**environment, "PYTHONPATH": path},
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
    )


def _seen(way: str, folders: tuple[Path, Path], *words: str, threads: int = 1) -> dict[str, Any]:
    agent = _start(way, folders, *words, threads=threads)
    told, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0
    run_dir, workdir = folders
    seen: dict[str, Any] = json.loads((workdir / "seen.json").read_text())
    return {**seen, "code": int(told.split()[0]), **_logged(run_dir)}


def _logged(run_dir: Path) -> dict[str, Any]:
    log = (run_dir / "logs" / "rank-1.log").read_text()
    return {"log": log.splitlines()[:1], "last": log.splitlines()[-1:], "lines": log.count("\n")}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3, 2000])
def test_a_forked_rank_sees_what_an_executed_one_sees(folders: tuple[Path, Path], threads: int) -> None:
    words = ("raise SystemExit(7)", "a b", "$local_rank ${x}", "ü\n", "threads")
    forked, executed = (_seen(way, folders, *words, threads=threads) for way in ("fork", "exec"))
    assert forked.pop("random") != numpy.random.RandomState(5).rand()
    assert forked.pop("torch random") != torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    executed.pop("random"), executed.pop("torch random")
    assert executed.pop("lines") == 2 * forked.pop("lines"), "in one log"
    assert forked == executed
    assert forked["code"] == 7
    assert forked["threads"] >= 1
    assert forked["sockets"] == []
    assert len(forked["carried"]) == 3


_ENDS: tuple[tuple[str, int, str], ...] = (
    ("raise ValueError('broken')", 1, "ValueError: broken"),
    ("sys.exit('in words')", 1, "in words"),
    ("sys.exit(300)", 300 & 0xFF, "to the log"),
    ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, "to the log"),
    ("pass", 0, "to the log"),
    ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
    ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT, "KeyboardInterrupt"),
    ("import atexit; atexit.register(print, 'at exit')", 0, "at exit"),
    ("import atexit; atexit.register(print, 'once'); atexit.register(print, 'first')", 0, "once"),
    ("import atexit; atexit.register(print, 'at exit', flush=True); raise SystemExit(5)", 5, "at exit"),
    ("import weakref; weakref.finalize(folder := type('F', (), {})(), print, 'at exit')", 0, "at exit"),
    ("sys.exit(-1)", 255, "to the log"),
    ("import threading; threading.Thread(target=lambda: (time.sleep(1), print('joined'))).start()", 0, "joined"),
    ("sys.excepthook = lambda *_: print('hooked'); raise ValueError", 1, "hooked"),
    ("sys.stdout.write('unfinished')", 0, "unfinished"),
)
"""What a rank does, its exit code, and the last line of its log."""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tuple[Path, Path], dict[str, Any]]]:
    """How each of them ended as a fork: all are of one agent, which imports torch once."""
    folder = tmp_path_factory.mktemp("ends")
    places: dict[str, tuple[Path, Path]] = {}
    for number, (end, _, _) in enumerate(_ENDS):
        places[end] = folder / f"run-{os.getpid()}-{time.time_ns()}-{number}", folder / "work dir"
        (places[end][0] / "logs").mkdir(parents=True)
    _write_program(folder / "work dir")
    agent = _start("fork", next(iter(places.values())), stdin=subprocess.PIPE)
    asked = (json.dumps([str(run_dir), f"import time; {end}"]) for end, (run_dir, _) in places.items())
    told, _ = agent.communicate("\n".join(asked), timeout=240)
    assert agent.returncode == 0
    codes = told.split()[: len(places)]
    return {
        end: (places[end], {"code": int(code), **_logged(places[end][0])})
        for end, code in zip(places, codes, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "last"), _ENDS)
def test_a_forked_rank_ends_like_an_executed_one(
    forked: dict[str, tuple[tuple[Path, Path], dict[str, Any]]], end: str, code: int, last: str
) -> None:
    folders, found = forked[end]
    executed = _seen("exec", folders, f"import time; {end}")
    assert (found["code"], found["last"]) == (executed["code"], executed["last"]) == (code, [last])
    if "atexit" in end:
        assert executed["lines"] == 2 * found["lines"], "in one log: each is called once, none of the agent's"


@pytest.mark.slow
def test_a_forked_rank_dies_with_its_agent_and_a_sweep_finds_its_children(folders: tuple[Path, Path]) -> None:
    child = "import time; os.fork() or os.setsid(); open(f'pid-{os.getpid()}', 'w').close(); time.sleep(600)"
    agent = _start("fork", folders, child)
    run_dir, workdir = folders
    end_s = time.monotonic() + 60
    while len(list(workdir.glob("pid-*"))) < 2 and time.monotonic() < end_s:
        time.sleep(0.05)
    pids = {int(path.name.removeprefix("pid-")) for path in workdir.glob("pid-*")}
    assert len(pids) == 2
    assert set(carriers(run_dir.name, 0)) == pids
    agent.kill()
    agent.wait()
    while len(set(carriers(run_dir.name, 0))) > 1 and time.monotonic() < end_s:
        time.sleep(0.01)
    assert sweep(run_dir.name, 0) == 1  # the child of the rank; the rank went with its agent
    assert set(carriers(run_dir.name)) == set()
    assert agent.stdout is not None
    agent.stdout.close()


@pytest.mark.slow
def test_a_start_that_fails_is_told_where_people_look(folders: tuple[Path, Path]) -> None:
    run_dir, workdir = folders
    (run_dir / "logs").rmdir()
    agent = subprocess.Popen(
        [sys.executable, "-c", _AGENT, "1", str(run_dir), str(workdir), sys.executable, "-u", "-m", "ranked", "pass"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told, said = agent.communicate(timeout=120)
    assert told.split() == ["1", "of", "the", "agent"], said
    assert "No such file or directory" in said
