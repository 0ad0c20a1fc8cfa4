"""Runs under a real mpiexec: Open MPI and MPICH, with four ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.launches import QUICKSTART, Launch, losses, write_job
from tests.launch.aside import SLEEP, check_left_alone
from tests.launch.own import own

PROGRAM = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(x)
print("sum", x.item(), "local", os.environ["LOCAL_RANK"], "of", os.environ["LOCAL_WORLD_SIZE"], flush=True)
dist.destroy_process_group()
"""
ONE_FAILS = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
print("local", os.environ["LOCAL_RANK"], "of", os.environ["LOCAL_WORLD_SIZE"], flush=True)
pathlib.Path(f"up-{rank}").touch()
while rank == os.environ.get("BAD") and len(list(pathlib.Path(".").glob("up-*"))) < 4:
    time.sleep(0.1)
sys.exit(7) if rank == os.environ.get("BAD") else time.sleep(120)
"""


NO_PICKLE = """
import sys
if "mpi4py" in sys.orig_argv:
    from mpi4py import MPI
    def refuse(*args):
        raise AssertionError("objects are pickled")
    MPI.pickle.__init__(refuse, refuse)
"""


@pytest.fixture(params=["openmpi", "mpich"])
def mpiexec(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of both, as Debian names them; its processes cannot pickle for each other."""
    found = shutil.which(f"mpiexec.{request.param}")
    pytest.importorskip("mpi4py", reason="pip install 'meshwright[mpi]'")
    if found is None:
        pytest.skip(
            f"no mpiexec.{request.param}: apt install {'openmpi-bin' if request.param == 'openmpi' else 'mpich'}"
        )
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    if request.param == "mpich":  # Debian calls the library differently from what mpi4py's wheel asks for
        for each in Path("/usr/lib").glob("*/libmpich.so.12"):
            (tmp_path / "libmpi.so.12").symlink_to(each)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "no-pickle").mkdir()
    (tmp_path / "no-pickle/sitecustomize.py").write_text(NO_PICKLE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'no-pickle'}:{os.environ.get('PYTHONPATH', '')}")
    return found


def _launch(folder: Path, job: str, *words: str) -> Any:
    (folder / "job.yaml").write_text(job)
    argv = [sys.executable, "-m", "meshwright.launch.cli", "launch", "job.yaml", "--run-id", own("mpi"), *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def _job(mpiexec: str, more: str = "", *, program: str = ONE_FAILS) -> str:
    command = json.dumps([sys.executable, "-c", program])
    return f"name: j\ncommand: {command}\nnproc_per_node: 4\ncluster: {{type: mpi, mpiexec: {mpiexec}}}\n{more}"


@pytest.mark.parametrize("mpiexec", ["mpich"], indirect=True)  # under Open MPI the quickstart does
def test_ranks_find_their_places_by_shared_memory_and_talk(tmp_path: Path, mpiexec: str) -> None:
    done = _launch(tmp_path, _job(mpiexec, program=PROGRAM).replace("nproc_per_node: 4", "nproc_per_node: 2"))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"node0:{rank} | sum 3.0 local {rank} of 2" in done.stdout


def test_one_failing_rank_ends_the_job_with_its_own_code(tmp_path: Path, mpiexec: str) -> None:
    start_s = time.monotonic()
    done = _launch(tmp_path, _job(mpiexec, 'env: {BAD: "2"}\nfailure: {shutdown_grace: 2s}\n'))
    assert done.returncode == 7, done.stderr
    assert time.monotonic() - start_s < 100
    assert "first failure: rank 2 on node0: exited with code 7" in done.stderr
    assert {f"node0:{rank} | local {rank} of 4" for rank in range(4)} <= set(done.stdout.splitlines())
    assert list(carriers(own("mpi"))) == []


FAILS_ONCE = """
import os, pathlib, signal, sys, time
rank, attempt = os.environ["RANK"], os.environ["MESHWRIGHT_ATTEMPT"]
print("attempt", attempt, flush=True)
pathlib.Path(f"up-{attempt}-{rank}").touch()
if attempt == "2" or (attempt == "1" and os.environ["THEN"] == "end"):
    sys.exit(0)
while rank == "2" and len(list(pathlib.Path(".").glob(f"up-{attempt}-*"))) < 4:
    time.sleep(0.1)
if rank == "2" and attempt == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "2":
    import no_such_module
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("mpiexec", "then", "code"), [("openmpi", "end", 0), ("mpich", "import", 1)], indirect=["mpiexec"]
)  # what follows the second start is the launcher's
def test_the_launcher_starts_a_failed_run_again_as_its_policy_has_it(
    tmp_path: Path, mpiexec: str, then: str, code: int
) -> None:
    keys = f"env: {{THEN: {then}}}\nfailure: {{max_restarts: 3, backoff: {{initial: 100ms}}, shutdown_grace: 2s}}\n"
    done = _launch(tmp_path, _job(mpiexec, keys, program=FAILS_ONCE))
    assert done.returncode == code, done.stderr
    run_dir = tmp_path / "runs/j" / own("mpi")
    told = json.loads((run_dir / "exit.json").read_text())
    assert told["attempts"] == 2
    assert [(each["kind"], each["rank"], each["attempt"]) for each in told["restarts"]] == [("signal", 2, 0)]
    assert told["restarts"][0]["down_s"] > 0
    for rank in range(4):
        assert "attempt 1" in (run_dir / f"logs/rank-{rank}.attempt-1.log").read_text()
        assert f"node0:{rank} | attempt 1" in done.stdout
    if then == "import":
        assert "import_error is in failure.no_retry_on" in told["given_up"]
    assert list(carriers(own("mpi"))) == []


def test_a_port_that_is_taken_is_said_with_the_code_of_a_meeting_that_failed(tmp_path: Path, mpiexec: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _launch(tmp_path, _job(mpiexec, f"rendezvous: {{port: {port}}}\n"))
    assert done.returncode == 76, done.stderr
    assert f"port {port} of 127.0.0.1" in done.stderr
    assert list(carriers(own("mpi"))) == []


def test_ranks_that_do_not_lie_as_planned_are_refused(tmp_path: Path, mpiexec: str) -> None:
    job = _job(mpiexec).replace("nproc_per_node: 4", "nproc_per_node: 2\nnodes: 2")
    done = _launch(tmp_path, job)
    assert done.returncode in ((76,) if "mpich" in mpiexec else (69, 76)), done.stderr  # Open MPI refuses it itself


@pytest.mark.parametrize("mpiexec", ["openmpi"], indirect=True)  # ranks themselves know nothing of MPI
def test_the_quickstart_trains_on_four_ranks_of_mpiexec_as_it_does_here(
    tmp_path: Path, mpiexec: str, here: list[Any]
) -> None:
    far = Launch(tmp_path, {"far": {"type": "mpi", "mpiexec": mpiexec}}, own("mpi-quickstart"))
    done = far.run(*QUICKSTART, "--set", "cluster=far", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(far.folder / "runs/quickstart" / far.run_id) == here


def test_a_launcher_that_is_killed_leaves_no_rank_and_no_child_of_one(tmp_path: Path, mpiexec: str) -> None:
    program = "import subprocess\nsubprocess.Popen(['sleep', '300'], start_new_session=True)\n" + ONE_FAILS
    (tmp_path / "job.yaml").write_text(_job(mpiexec, 'env: {BAD: "none"}\n', program=program))
    argv = [sys.executable, "-m", "meshwright.launch.cli", "launch", "job.yaml", "--run-id", own("killed")]
    launcher = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _until(lambda: len(list(carriers(own("killed")))) >= 8, 90)
    launcher.kill()
    launcher.wait()
    _until(lambda: not list(carriers(own("killed"))), 30)


@pytest.mark.parametrize("mpiexec", ["openmpi"], indirect=True)  # it is about the launcher
def test_a_run_under_mpiexec_is_left_alone_and_found_again(tmp_path: Path, mpiexec: str) -> None:
    far = Launch(tmp_path, {"far": {"type": "mpi", "mpiexec": mpiexec}}, own("mpi-alone"))
    job = write_job(far.folder, SLEEP, cluster="far", nproc_per_node=2, failure={"shutdown_grace": "2s"})
    check_left_alone(far.run_dir, far.env, str(job), ranks=2)


def _until(true: Callable[[], bool], timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, os.getpid()
        time.sleep(0.2)
