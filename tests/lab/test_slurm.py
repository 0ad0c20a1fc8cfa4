"""Two Slurm nodes: the same job, the same numbers; our own record decides; runs are found again from any terminal."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Hosts
from tests.lab.launches import QUICKSTART, Launch, finish, losses, write_job, write_training
from tests.lab.slurm import Slurm, holds
from tests.launch.waiting import eventually, kill_all

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def launch(
    slurm: Slurm, source: dict[str, str], lab_folder: Path, request: pytest.FixtureRequest
) -> Callable[..., Launch]:
    """Makes a launch with the cluster `far`; its keys and variables are the test's."""
    name = re.sub(r"[^a-z]+", "-", request.node.name.lower())[5:60]
    slurm.mend()  # whatever befell it before

    def make(env: dict[str, str] | None = None, **keys: Any) -> Launch:
        run_id = f"{name.strip('-')}-{os.getpid()}-{len(list(lab_folder.iterdir()))}"
        own = {**source, **slurm.env, **(env or {})}
        return Launch(lab_folder / run_id, {"far": {"type": "slurm", "nodes": 2, **keys}}, run_id, own)

    return make


def up(far: Launch, ranks: int = 2) -> bool:
    """Whether all ranks have started."""
    merged = far.run_dir / "merged.log"
    return eventually(lambda: merged.exists() and merged.read_text().count("up") == ranks, 150)


def test_the_quickstart_trains_on_slurm_as_it_does_here(launch: Callable[..., Launch], here: list[Any]) -> None:
    far = launch()
    done = far.run(*QUICKSTART, "--set", "cluster=far", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(far.folder / "runs/quickstart" / far.run_id) == here


def test_a_failing_rank_keeps_its_code_and_the_real_name_of_its_node(launch: Callable[..., Launch]) -> None:
    far = launch()
    script = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)"
    done = far.run(write_job(far.folder, script, cluster="far"))
    assert done.returncode == 7, done.stdout + done.stderr
    assert "rank 1 on h2 failed first" in done.stdout
    assert far.record()["victims"][0]["host"] == "h1"
    assert [node["name"] for node in json.loads((far.run_dir / "plan.json").read_text())["nodes"]] == ["h1", "h2"]
    assert not list(carriers(far.run_id))


def test_a_run_is_left_alone_found_looked_at_and_ended_from_elsewhere(launch: Callable[..., Launch]) -> None:
    far = launch()
    done = far.run(write_job(far.folder, SLEEP, cluster="far", failure={"shutdown_grace": "2s"}), "--detach")
    assert done.returncode == 0, done.stderr
    assert up(far)
    (run,) = json.loads(far.type("ps", "--json").stdout)["runs"]
    assert (run["run_id"], run["cluster"], run["state"]) == (far.run_id, "slurm", "running")
    assert far.type("logs", far.run_id, "--rank", "1").stdout == "h2:1 | up\n"
    assert "was cancelled" in far.type("cancel", far.run_id).stdout
    attached = far.type("attach", far.run_id)
    assert attached.returncode in (130, 143), attached.stdout + attached.stderr
    assert "h1:0 | up" in attached.stdout
    assert far.record()["state"] == "interrupted"
    assert eventually(lambda: not list(carriers(far.run_id)), 30)
    assert json.loads(far.type("ps", "--json").stdout)["runs"] == []
    assert "is over" in far.type("cancel", far.run_id).stderr


def test_ctrl_c_cancels_the_job(launch: Callable[..., Launch], slurm: Slurm) -> None:
    far = launch()
    launcher = far.start(write_job(far.folder, SLEEP, cluster="far", failure={"shutdown_grace": "2s"}))
    try:
        assert up(far)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 130, output
    slurm.quiet()
    assert not list(carriers(far.run_id))


def _state(slurm: Slurm, job: str) -> str:
    return slurm.type("squeue", "-h", "-j", job, "-o", "%T").strip()


def _hurried(slurm: Slurm, job: str) -> str:
    """The state of a job that is not to wait: Slurm itself holds what is queued again for two minutes.

    A node refuses a start of the same second in which it was told to end the job ("credential revoked").
    """
    time.sleep(2.5)
    slurm.type("scontrol", "update", f"JobId={job}", "StartTime=now")
    time.sleep(1)
    return _state(slurm, job)


def test_a_warned_elastic_training_saves_and_goes_on_with_the_nodes_that_there_are(
    launch: Callable[..., Launch], slurm: Slurm
) -> None:
    far = launch()
    run_dir, steps = far.folder / "runs" / far.run_id, 60
    job_file = write_training(far.folder, steps=steps, every=1000, pause_s=0.1)
    elastic = ("cluster=far", "nodes={min: 1, max: 2}", "parallel.dp=2", "nproc_per_node=1")
    launcher = far.start(job_file, *(word for each in elastic for word in ("--set", each)))

    def warned(times: int) -> None:
        """Warns the job after some more steps, and sees it queued again and started."""
        before = len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
        assert eventually(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= before + 4, 150)
        job = json.loads((run_dir / "launch.json").read_text())["job"]
        slurm.type("scancel", "--batch", "--signal=USR2", job)
        assert eventually((run_dir / f"exit-{times}.json").exists, 150), (run_dir / "launcher.log").read_text()
        assert eventually(lambda: _state(slurm, job) == "PENDING", 60), slurm.type("squeue")
        assert eventually(lambda: _hurried(slurm, job) != "PENDING", 60), slurm.type("squeue")

    try:
        assert eventually((run_dir / "metrics.jsonl").exists, 150)
        slurm.type("scontrol", "update", "NodeName=h2", "State=DRAIN", "Reason=lab")
        warned(0)
        slurm.type("scontrol", "update", "NodeName=h2", "State=RESUME")
        warned(1)
        output, _ = launcher.communicate(timeout=240)
    finally:
        slurm.type("scontrol", "update", "NodeName=h2", "State=RESUME")
        finish(launcher)
    assert launcher.returncode == 0, output
    assert [json.loads((run_dir / f"exit-{times}.json").read_text())["exit_code"] for times in (0, 1)] == [75, 75]
    first, second = (int(step) for step in re.findall(r"resumed from .* at step (\d+)", output))
    assert 1 <= first < second < steps
    assert re.findall(r"Slurm gave (\d) nodes; ranks run on (\d)", output) == [("2", "2"), ("1", "1"), ("2", "2")]
    assert [step for step, name, _ in losses(run_dir) if name == "loss"] == list(range(1, steps + 1))


def _trains(far: Launch, *words: str, steps: int = 4) -> "tuple[subprocess.Popen[str], Path, str]":
    """A launched training that saves only when it is warned, some steps after its start; and Slurm's id of it."""
    job_file = write_training(far.folder, steps=900, every=1000, pause_s=0.1)
    sets = ("cluster=far", "parallel.dp=2", "nproc_per_node=1", *words)
    launcher = far.start(job_file, *(word for each in sets for word in ("--set", each)))
    run_dir = far.folder / "runs" / far.run_id
    assert eventually(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= steps, 150)
    return launcher, run_dir, json.loads((run_dir / "launch.json").read_text())["job"]


def _goes_on(slurm: Slurm, run_dir: Path, job: str) -> tuple[int, int]:
    """The last step of a run before it was queued again, and that from which it went on."""
    log = run_dir / "launcher.log"
    assert eventually((run_dir / "exit-0.json").exists, 60), log.read_text()
    last = losses(run_dir)[-1][0]
    assert json.loads((run_dir / "exit-0.json").read_text())["exit_code"] == 75, log.read_text()
    assert eventually(lambda: _state(slurm, job) == "PENDING", 60), slurm.type("squeue")
    assert eventually(lambda: _hurried(slurm, job) != "PENDING", 60), slurm.type("squeue")
    assert eventually(lambda: "resumed from" in log.read_text(), 60), log.read_text()
    return last, int(re.findall(r"resumed from .* at step (\d+)", log.read_text())[0])  # it may be warned again


def test_a_real_preemption_is_used_to_save_and_costs_no_step(launch: Callable[..., Launch], slurm: Slurm) -> None:
    far = launch()
    launcher, run_dir, job = _trains(far, "checkpoint.signal=TERM")
    try:
        slurm.type("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--chdir=/", "-o/dev/null", "--wrap=:")
        last, first = _goes_on(slurm, run_dir, job)
        assert (first, "preempted after saving" in (run_dir / "launcher.log").read_text()) == (last, True)
    finally:
        slurm.type("scancel", job)
        finish(launcher)
    slurm.quiet()


def test_a_real_time_limit_is_warned_of_and_costs_no_step(launch: Callable[..., Launch], slurm: Slurm) -> None:
    far = launch(time="1m", nodes=1)
    words = ("checkpoint.lead=55s", "parallel.dp=1")
    launcher, run_dir, job = _trains(far, *words, steps=1)  # it may come a minute early
    try:
        last, first = _goes_on(slurm, run_dir, job)
        assert first == last
    finally:
        slurm.type("scancel", job)
        finish(launcher)
    slurm.quiet()


def test_secrets_are_in_nothing_that_slurm_keeps(launch: Callable[..., Launch], slurm: Slurm) -> None:
    secret = "s3cr3t-$(x)-'\"-slurm"
    far = launch(env={"MY_TOKEN": secret, "NOTE": "a b,c='d'"})
    script = (
        "import os, time\n"
        "print(os.environ['TOKEN'], os.environ['NOTE'], flush=True)\n"
        "while not os.path.exists('looked'): time.sleep(0.1)\n"
    )
    launcher = far.start(write_job(far.folder, script, cluster="far", secrets={"TOKEN": {"from_env": "MY_TOKEN"}}))
    merged = far.run_dir / "merged.log"
    try:
        assert eventually(lambda: merged.exists() and merged.read_text().count("***") == 2, 150)
        seen = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        kept = holds(slurm.folder, secret)
        (far.folder / "looked").touch()
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    assert output.count("*** a b,c='d'") == 2
    assert kept == []
    assert not [each for each in seen if secret.encode() in each]
    written = holds(far.folder, secret)
    assert {path.parent.name for path in written} <= {"logs"}, "the ranks' own words, in files of mode 0600"
    assert not (far.run_dir / "private/secrets.json").exists()


def test_nodes_can_be_left_out_and_what_slurm_cannot_run_is_refused(launch: Callable[..., Launch]) -> None:
    far = launch(nodes=1, exclude=["h1"])
    done = far.run(write_job(far.folder, "import socket; print(socket.gethostname())", cluster="far"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "h2:0 | h2" in done.stdout
    far = launch(nodes=3)
    done = far.run(write_job(far.folder, SLEEP, cluster="far"))
    assert done.returncode == 69, done.stdout + done.stderr
    assert "Slurm does not take this job" in done.stderr


def test_an_agent_that_is_killed_ends_the_run_and_its_node_is_named(
    launch: Callable[..., Launch], hosts: Hosts
) -> None:
    far = launch()
    launcher = far.start(write_job(far.folder, SLEEP, cluster="far", failure={"shutdown_grace": "2s"}))
    try:
        assert up(far)
        last = [pid for pid in carriers(far.run_id, 1)]
        agents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in last}
        kill_all(agents & set(last) or agents)
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 69, output
    assert "the agent of h2 died" in output
    assert eventually(lambda: not list(carriers(far.run_id)), 20)


def test_a_sweep_is_one_array_whose_runs_are_seen_and_ended_one_by_one(launch: Callable[..., Launch]) -> None:
    far = launch(nodes=1)
    grid = {"grid": {"env.A": ["1", "2", "3", "4"]}, "max_parallel": 2}
    script = (
        "import os, sys, time; print('up', flush=True); time.sleep(600 if os.environ['A'] != '3' else 0); sys.exit(3)"
    )
    job = write_job(far.folder, script, cluster="far", sweep=grid, failure={"shutdown_grace": "2s"})
    done = far.run(job, "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = far.folder / "runs"

    def standings() -> list[str]:
        found = {each["run_id"]: each["state"] for each in json.loads(far.type("ps", "--all", "--json").stdout)["runs"]}
        return [found[far.run_id], *(found[f"{far.run_id}-{index}"] for index in range(4))]

    assert eventually(lambda: len(list(runs.glob("j-A-*/*/merged.log"))) == 2, 150)
    assert standings() == ["running", "running", "running", "pending", "pending"]
    assert "was cancelled" in far.type("cancel", f"{far.run_id}-3").stdout
    assert "was cancelled" in far.type("cancel", f"{far.run_id}-0").stdout
    assert eventually(lambda: standings()[3] == "failed", 150), "the third takes the place of the first"
    assert standings()[0] == "running"
    assert "was cancelled" in far.type("cancel", far.run_id).stdout
    attached = far.type("attach", far.run_id)
    assert standings() == ["failed", "interrupted", "interrupted", "failed", "cancelled"]
    assert attached.returncode in (130, 143), attached.stdout + attached.stderr
    assert not [pid for index in range(4) for pid in carriers(f"{far.run_id}-{index}")]


def test_a_node_at_fault_is_left_out_when_the_job_is_queued_again(launch: Callable[..., Launch], slurm: Slurm) -> None:
    far = launch(nodes=1)
    script = (
        "import socket\n"
        "print('on', socket.gethostname(), flush=True)\n"
        "if socket.gethostname() == 'h1': raise RuntimeError('CUDA error: uncorrectable ECC error encountered')\n"
    )
    failure = {"max_restarts": 3, "exclude_bad_nodes": 2, "backoff": {"initial": "100ms"}}
    launcher = far.start(write_job(far.folder, script, cluster="far", failure=failure))
    try:
        assert eventually((far.run_dir / "exit-0.json").exists, 150), launcher.stdout
        job = json.loads((far.run_dir / "launch.json").read_text())["job"]
        assert eventually(lambda: _state(slurm, job) == "PENDING", 60), slurm.type("squeue")
        assert "ExcNodeList=h1" in slurm.type("scontrol", "show", "job", job)
        assert eventually(lambda: _hurried(slurm, job) != "PENDING", 60), slurm.type("squeue")
        output, _ = launcher.communicate(timeout=240)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    assert [line.split()[-1] for line in output.splitlines() if " | on " in line] == ["h1", "h1", "h2"]
    assert [(each["node"], each["attempt"]) for each in far.record()["excluded"]] == [("h1", 1)]
