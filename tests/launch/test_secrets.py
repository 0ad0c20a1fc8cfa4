"""A secret that a rank prints and dies of is nowhere: not in the run directory, not in what any command prints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from tests.launch.own import own
from tests.launch.waiting import eventually, kill_all

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_state")]

SECRET = "s3cr3t-'\"-\\-ü-value"
CRASHES = """
import json, os, pathlib, sys, time, traceback
token, rank = os.environ["TOKEN"], int(os.environ["RANK"])
print("here", token, flush=True)
sys.stdout.write("and " + token[:6]); sys.stdout.flush()
time.sleep(0.3)
print(token[6:], repr(token), json.dumps(token), flush=True)
attempt = os.environ["MESHWRIGHT_ATTEMPT"]
pathlib.Path(f"up-{attempt}-{rank}").touch()
while not os.path.exists("looked"): time.sleep(0.05)
if rank: time.sleep(60)
while not os.path.exists(f"up-{attempt}-1"): time.sleep(0.05)  # half a secret is none that could be masked
try:
    raise RuntimeError(token)
except RuntimeError:
    told = {"rank": rank, "time_unix_s": time.time(), "traceback": traceback.format_exc()}
    pathlib.Path(os.environ["MESHWRIGHT_RANK_DIR"], "error.json").write_text(json.dumps(told))
    raise
"""
KINDS = {
    "one node": {"type": "local"},
    "two nodes": {"type": "local", "simulate_nodes": 2},
    "mpi": {"type": "mpi", "mpiexec": shutil.which("mpiexec.openmpi") or "mpiexec"},
}


def typed(folder: Path, *words: str) -> str:
    env = {**os.environ, "MY_TOKEN": SECRET, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    argv = [sys.executable, "-m", "meshwright.launch.cli", *words]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def holding(folder: Path) -> list[str]:
    """Files below a folder that hold the secret, in any form."""
    forms = {json.dumps(each)[1:-1] for each in (SECRET, repr(SECRET)[1:-1])} | {SECRET, repr(SECRET)[1:-1], "cr3t"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted({path.name for path in files for form in forms if form.encode() in path.read_bytes()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_that_a_rank_prints_and_dies_of_is_nowhere(tmp_path: Path, kind: str) -> None:
    if kind == "mpi":
        pytest.importorskip("mpi4py", reason="pip install 'meshwright[mpi]'")
        if shutil.which(str(KINDS[kind]["mpiexec"])) is None:
            pytest.skip("no mpiexec: apt install openmpi-bin")
    run_id = own("secret")
    job = {
        "name": "j",
        "command": ["python", "-c", CRASHES],
        "setup": 'echo "set up with $TOKEN"',
        "secrets": {"TOKEN": {"from_env": "MY_TOKEN"}},
        "nproc_per_node": 1 if "simulate_nodes" in KINDS[kind] else 2,
        "cluster": KINDS[kind],
        "failure": {"shutdown_grace": "1s", **({} if kind == "mpi" else {"max_restarts": 1})},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run_dir = tmp_path / "runs/j" / run_id
    try:
        said = typed(tmp_path, "launch", "job.yaml", "--run-id", run_id, "--detach")
        assert eventually(lambda: len(list(tmp_path.glob("up-0-*"))) == 2), said
        assert eventually(lambda: not holding(run_dir / "logs"), 20), "while it runs, too"
        said += typed(tmp_path, "ps") + typed(tmp_path, "logs", run_id)
        (tmp_path / "looked").touch()
        said += typed(tmp_path, "attach", run_id)
    finally:
        kill_all(carriers(run_id))
    assert "RuntimeError: ***" in said, said
    said += "".join(typed(tmp_path, *words) for words in (("ps", "--all"), ("ps", "--all", "--json"), ("show", run_id)))
    said += typed(tmp_path, "logs", run_id) + typed(tmp_path, "page", run_id)
    assert "here ***" in said
    assert "cr3t" not in said
    assert holding(tmp_path / "runs") == []
