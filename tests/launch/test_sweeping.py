"""Real sweeps: runs beside each other on this machine, one array of tasks in a queue; nothing is left of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from tests.launch.own import own
from tests.launch.pretend_slurm import write_commands
from tests.launch.waiting import eventually, kill_all
from tests.launch.worker.runs import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_state")]

TINY = """\
name: tiny
model: {python: "tiny:build", arguments: {width: 8}}
data: {files: python-stdlib, tokenizer: bytes, sequence_length: 16, max_bytes: 64KiB}
train: {steps: 3, batch_size: 2, log_every_steps: 1, optimizer: {lr: 1e-2}}
checkpoint: {every_steps: 3}
sweep: {grid: {train.optimizer.lr: [1e-3, 1e-1, 1e-2]}, max_parallel: 2}
"""
LATE = "import os, sys, time; print('up', os.environ['A'], flush=True); time.sleep(600)"


def words(*more: str) -> list[str]:
    return [sys.executable, "-m", "meshwright.launch.cli", *more]


def typed(folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words(*more), cwd=folder, capture_output=True, text=True, timeout=180, check=False)


def started(folder: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words("launch", "job.yaml", "--run-id", own(folder.name), *more),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def write_job(folder: Path, script: str, values: list[str], **keys: Any) -> None:
    grid = {"grid": {"env.A": values}, "max_parallel": 2}
    job = {"name": "j", "command": ["python", "-c", script], "failure": {"shutdown_grace": "1s"}, "sweep": grid, **keys}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


def record(folder: Path, run: str = "") -> dict[str, Any]:
    place = f"runs/j-A-{run}/{own(folder.name)}-{int(run) - 1}" if run else f"runs/j/{own(folder.name)}"
    found: dict[str, Any] = json.loads((folder / place / "exit.json").read_text())
    return found


def ups(folder: Path) -> int:
    return sum(path.read_text().count("up") for path in folder.glob("runs/j-A-*/*/merged.log"))


def left(folder: Path) -> list[int]:
    return [pid for index in range(4) for pid in carriers(f"{own(folder.name)}-{index}")]


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """Ends what a failed test left."""
    yield
    kill_all(left(tmp_path))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, as far as they are needed."""
    write_commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "bin"


SLURM = {"rendezvous": {"interface": "lo"}, "cluster": {"type": "slurm"}}


def test_three_tiny_runs_train_two_at_a_time_and_save_apart(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(TINY)
    (tmp_path / "tiny.py").write_text(MODEL)
    done = typed(tmp_path, "launch", "job.yaml", "--run-id", own("r"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [run["values"] for run in told["runs"]] == [f"train.optimizer.lr={lr}" for lr in (0.001, 0.1, 0.01)]
    assert [run["state"] for run in told["runs"]] == ["succeeded"] * 3
    lines = [line for line in done.stderr.splitlines() if "started" in line or "succeeded:" in line]
    assert [" ".join(line.split()[:2]).rstrip(":") for line in lines[:2]] == [
        f"{own('r')}-{run} started" for run in (0, 1)
    ]
    assert lines.index(next(line for line in lines if "succeeded" in line)) == 2, "the third waits for one of the two"
    for run in told["runs"]:
        lines = (Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        assert run["loss"] == [loss for line in lines if (loss := json.loads(line).get("loss")) is not None][-1]
    assert len({run["loss"] for run in told["runs"]}) == 3
    assert (tmp_path / "runs/tiny-lr-0.1/checkpoints").is_dir()


def test_one_failed_run_stops_no_other_and_the_worst_code_counts(tmp_path: Path) -> None:
    write_job(tmp_path, "import os, sys; sys.exit(int(os.environ['A']) % 3)", ["1", "2", "3"])
    done = typed(tmp_path, "launch", "job.yaml", "--run-id", own(tmp_path.name))
    assert done.returncode == 2, done.stderr
    assert [record(tmp_path, run)["exit_code"] for run in ("1", "2", "3")] == [1, 2, 0]
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"{own(tmp_path.name)}-1  "))
    assert "failed (2)" in row
    assert (record(tmp_path)["state"], record(tmp_path)["reason"]) == ("failed", "2 of 3 runs did not succeed")
    rows = json.loads(typed(tmp_path, "ps", "--all", "--json").stdout)["runs"]
    assert [each["sweep"] for each in rows].count(own(tmp_path.name)) == 3
    assert next(each for each in rows if each["runs"])["exit_code"] == 2


def test_nothing_starts_where_the_last_run_could_not(tmp_path: Path) -> None:
    write_job(tmp_path, LATE, ["1"])
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    job["sweep"]["grid"]["cluster.gpus_per_node"] = [None, 99]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = typed(tmp_path, "launch", "job.yaml")
    assert done.returncode == 69, done.stderr
    assert "asked for 1 x 99 GPUs" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    write_job(tmp_path, LATE, ["1", "2", "3"])
    launcher = started(tmp_path)
    assert eventually(lambda: ups(tmp_path) == 2)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=180)
    assert launcher.returncode == 130, output
    assert [record(tmp_path, run)["state"] for run in ("1", "2")] == ["interrupted"] * 2
    assert "not started" in next(line for line in output.splitlines() if line.startswith(f"{own(tmp_path.name)}-2  "))
    assert record(tmp_path)["state"] == "interrupted"
    assert left(tmp_path) == []


def test_runs_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    write_job(tmp_path, LATE, ["1", "2", "3"])
    launcher = started(tmp_path)
    assert eventually(lambda: ups(tmp_path) == 2)
    launcher.kill()
    launcher.communicate(timeout=180)
    assert eventually(lambda: left(tmp_path) == [])
    assert eventually(lambda: len(list(tmp_path.glob("runs/j-A-*/*/exit.json"))) == 2)
    assert [record(tmp_path, run)["state"] for run in ("1", "2")] == ["interrupted"] * 2
    assert "lost" in typed(tmp_path, "ps", "--all").stdout


def test_a_sweep_is_left_alone_looked_at_and_ended_whole_or_by_one_run(tmp_path: Path) -> None:
    write_job(tmp_path, LATE, ["1", "2"])
    sweep = own(tmp_path.name)
    done = typed(tmp_path, "launch", "job.yaml", "--run-id", sweep, "--detach")
    assert done.returncode == 0, done.stderr
    assert eventually(lambda: ups(tmp_path) == 2)
    assert f"{sweep}-1" in typed(tmp_path, "ps").stdout
    said = typed(tmp_path, "logs", sweep).stdout.splitlines()
    assert {line.split()[0] for line in said} == {f"{sweep}-0", f"{sweep}-1"}
    assert "was asked to end" in typed(tmp_path, "cancel", f"{sweep}-0").stdout
    assert eventually((tmp_path / f"runs/j-A-1/{sweep}-0/exit.json").exists)
    assert f"run {sweep}: its launcher" in typed(tmp_path, "cancel", sweep).stdout
    attached = typed(tmp_path, "attach", sweep)
    assert attached.returncode == 143, attached.stdout + attached.stderr
    assert f"{sweep}-1  " in attached.stdout
    assert left(tmp_path) == []


def test_a_sweep_in_a_queue_is_one_array_with_a_record_per_run(tmp_path: Path, slurm: Path) -> None:
    script = "import os, sys; print('up', os.environ['A']); sys.exit(int(os.environ['A']) % 3)"
    write_job(tmp_path, script, ["1", "2", "3"], **SLURM)
    launcher = started(tmp_path, "--json")
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 2, output
    assert (slurm / "script").read_text().count("set --") == 3
    assert [record(tmp_path, run)["exit_code"] for run in ("1", "2", "3")] == [1, 2, 0]
    told = json.loads(output.splitlines()[-1])
    assert [run["state"] for run in told["runs"]] == ["failed", "failed", "succeeded"]
    folder = tmp_path / f"runs/j-A-1/{own(tmp_path.name)}-0"
    assert json.loads((folder / "launch.json").read_text())["job"] == "42_0"
    assert "rank 0 on n0 failed first" in (folder / "launcher.log").read_text()
    assert not list(tmp_path.glob("runs/*/*/private/secrets.json"))


def test_tasks_and_the_whole_array_are_cancelled_from_another_terminal(tmp_path: Path, slurm: Path) -> None:
    write_job(tmp_path, LATE, ["1", "2", "3", "4"], **SLURM)
    sweep = own(tmp_path.name)
    assert typed(tmp_path, "launch", "job.yaml", "--run-id", sweep, "--detach").returncode == 0
    assert eventually(lambda: ups(tmp_path) == 2)
    runs = {each["run_id"]: each for each in json.loads(typed(tmp_path, "ps", "--json").stdout)["runs"]}
    assert {run: each["state"] for run, each in runs.items()} == {
        sweep: "running",
        f"{sweep}-0": "running",
        f"{sweep}-1": "running",
        f"{sweep}-2": "pending",
        f"{sweep}-3": "pending",
    }
    assert "job 42_3 was cancelled" in typed(tmp_path, "cancel", f"{sweep}-3").stdout
    assert "job 42_0 was cancelled" in typed(tmp_path, "cancel", f"{sweep}-0").stdout
    assert eventually(lambda: ups(tmp_path) == 3), "the third takes its place"
    assert "job 42 was cancelled" in typed(tmp_path, "cancel", sweep).stdout
    attached = typed(tmp_path, "attach", sweep)
    assert attached.returncode == 143, attached.stdout + attached.stderr
    rows = {row["run_id"]: row["state"] for row in record(tmp_path)["runs"]}
    assert list(rows.values()) == ["interrupted"] * 3 + ["cancelled"]
    assert left(tmp_path) == []
