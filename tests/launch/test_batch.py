"""A run in a queue has its launcher with it: that one decides, writes the record, and queues the run again."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.slurm import plan_slurm
from meshwright.clusters.sweep import carriers
from meshwright.launch.batch import main
from meshwright.launch.report import Outcome
from meshwright.launch.rundir import RunDirError
from meshwright.launch.spec.job import Job
from tests.clusters.test_slurm import OPTIONS, REQUEST
from tests.launch.own import own
from tests.launch.pretend_slurm import write_commands
from tests.launch.waiting import eventually, kill_all

pytestmark = pytest.mark.slow
ONE = {"nodes": 1, "nproc_per_node": 2}  # where nodes do not matter: the agent of each imports torch


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_state: Path) -> Path:
    """Slurm's commands, as far as they are needed."""
    folder = tmp_path / "bin"
    write_commands(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    del own_state
    return folder


def start(folder: Path, script: str, *more: str, **keys: object) -> "subprocess.Popen[str]":
    job = {
        "name": "j",
        "command": ["python", "-u", "-c", script],
        "nodes": 2,
        "rendezvous": {"interface": "lo"},
        "cluster": {"type": "slurm"},
        **keys,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return subprocess.Popen(
        [sys.executable, "-m", "meshwright.launch.cli", "launch", "job.yaml", "--run-id", own(folder.name), *more],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(launcher: "subprocess.Popen[str]", folder: Path, timeout_s: float = 240) -> str:
    """What a launch said, once it has ended; whatever happens, nothing stays."""
    try:
        output, _ = launcher.communicate(timeout=timeout_s)
    finally:
        launcher.kill()
        kill_all(carriers(own(folder.name)))
    return output


def test_lines_of_all_nodes_and_the_record_come_back(tmp_path: Path) -> None:
    script = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['MESHWRIGHT_HOST'])"
    launcher = start(tmp_path, script)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert {"n0:0 | 0 2 n0", "n1:1 | 1 2 n1"} <= set(output.splitlines())
    run_dir = tmp_path / "runs/j" / own(tmp_path.name)
    assert json.loads((run_dir / "exit.json").read_text())["state"] == "succeeded"
    assert list((run_dir / "private/step").glob("start.json")) == [], "the key is taken away"


def test_the_code_is_the_failing_ranks_own(tmp_path: Path) -> None:
    script = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)"
    launcher = start(tmp_path, script, "--json")
    output = end(launcher, tmp_path)
    assert launcher.returncode == 7, output
    assert "rank 1 on n1 failed first" in output
    assert json.loads(output.splitlines()[-1])["exit_code"] == 7


def test_ranks_that_were_warned_and_left_are_queued_again(tmp_path: Path, commands: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1':\n"  # this one does not catch it, and must not be killed by it
        "    time.sleep(1 if os.path.exists('left') else 600); sys.exit(0)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: (open('left', 'w').close(), os._exit(75)))\n"
        "print('up', flush=True)\n"
        "time.sleep(1 if os.path.exists('left') else 600)\n"
    )
    launcher = start(tmp_path, script, failure={"shutdown_grace": "1s"})
    run_dir = tmp_path / "runs/j" / own(tmp_path.name)
    merged = run_dir / "merged.log"
    assert eventually(lambda: merged.exists() and "up" in merged.read_text())
    os.kill(int((commands / "batch").read_text()), signal.SIGUSR2)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert json.loads((run_dir / "exit-0.json").read_text())["exit_code"] == 75
    assert "is queued again" in output
    assert merged.read_text().count("up") == 2
    assert (run_dir / "logs/rank-0.start-0.log").read_text() == (run_dir / "logs/rank-0.log").read_text() == "up\n"


SAVES = (
    "import os, signal, time\n"
    "again = os.path.exists('left')\n"
    "signal.signal(signal.{signal}, lambda *_: (open('left', 'w').close(), os._exit(75)))\n"
    "print('up', flush=True)\n"
    "time.sleep(1 if again else 600)\n"
)


def _warned(folder: Path, commands: Path, *words: str, **keys: object) -> "tuple[subprocess.Popen[str], Path, str]":
    """A launch of ranks that leave when they are warned, of which something was told by `kill` or Slurm's commands."""
    launcher = start(folder, SAVES.format(signal=words[0]), failure={"shutdown_grace": "1s"}, **keys)
    run_dir = folder / "runs/j" / own(folder.name)
    merged = run_dir / "merged.log"
    assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2)
    pids = {name: (commands / name).read_text() for name in ("batch", "step")}
    subprocess.run([word.format(**pids) for word in words[1:]], check=True)
    return launcher, run_dir, end(launcher, folder)


def test_the_signal_that_ends_runs_warns_where_the_job_wants_it_and_slurm_goes_on(
    tmp_path: Path, commands: Path
) -> None:
    words = ("SIGTERM", "kill", "-TERM", "{batch}")
    launcher, run_dir, output = _warned(tmp_path, commands, *words, checkpoint={"signal": "TERM"})
    assert launcher.returncode == 0, output
    assert json.loads((run_dir / "exit-0.json").read_text())["exit_code"] == 75
    assert "preempted after saving; job 42 is queued again" in output


def test_a_preemption_of_which_only_the_tasks_hear_lets_ranks_save_in_its_grace(tmp_path: Path, commands: Path) -> None:
    (commands / "preempt").touch()
    launcher, run_dir, output = _warned(tmp_path, commands, "SIGUSR2", "kill", "-TERM", "{step}")
    assert launcher.returncode == 0, output
    assert json.loads((run_dir / "exit-0.json").read_text())["exit_code"] == 75
    assert "preempted after saving; job 42 is queued again" in output


def test_a_requeue_without_a_grace_lets_ranks_save_while_slurm_waits_to_kill(tmp_path: Path, commands: Path) -> None:
    words = ("SIGUSR2", str(commands / "scontrol"), "requeue", "42")
    launcher, run_dir, output = _warned(tmp_path, commands, *words, **ONE)
    assert launcher.returncode == 0, output
    assert json.loads((run_dir / "exit-0.json").read_text())["exit_code"] == 75
    assert "Slurm ended job 42 to start it again" in output
    assert (commands / "updated").read_text() == "JobId=42 StartTime=now+15\n"


def test_a_preemption_that_ranks_did_not_live_to_save_in_is_one_all_the_same(tmp_path: Path, commands: Path) -> None:
    (commands / "preempt").touch()
    script = "import os\nopen('rank-' + os.environ['RANK'], 'w').write(str(os.getpid()) + '\\n')\n"
    launcher = start(tmp_path, script + SAVES.format(signal="SIGUSR1"), failure={"shutdown_grace": "1s"}, **ONE)
    run_dir = tmp_path / "runs/j" / own(tmp_path.name)
    merged = run_dir / "merged.log"
    assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2)
    step = (commands / "step").read_text()
    words = ["sh", "-c", f"touch left; kill -TERM {step}; sleep 2; kill -KILL $(cat rank-*)"]
    subprocess.run(words, cwd=tmp_path, check=True)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert json.loads((run_dir / "exit-0.json").read_text())["exit_code"] == 137
    assert "preempted before its ranks had saved; job 42 is queued again" in output


def test_ctrl_c_cancels_the_job_and_ranks_end_with_grace(tmp_path: Path) -> None:
    launcher = start(
        tmp_path, "import time; print('up', flush=True); time.sleep(600)", failure={"shutdown_grace": "1s"}, **ONE
    )
    merged = tmp_path / "runs/j" / own(tmp_path.name) / "merged.log"
    assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2)
    launcher.send_signal(signal.SIGINT)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 130, output
    assert json.loads((merged.parent / "exit.json").read_text())["state"] == "interrupted"


def test_nodes_that_meet_over_a_store_agree_to_start_again(tmp_path: Path) -> None:
    script = (
        "import os, signal, time\n"
        "first = os.environ['MESHWRIGHT_ATTEMPT'] == '0'\n"
        "if first and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600 if first else 0)\n"
    )
    failure = {"max_restarts": 1, "retry_on": ["signal"], "backoff": {"initial": "300ms"}, "shutdown_grace": "1s"}
    launcher = start(tmp_path, script, failure=failure)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    told = json.loads((tmp_path / "runs/j" / own(tmp_path.name) / "exit.json").read_text())
    assert [(each["kind"], each["rank"], each["host"]) for each in told["restarts"]] == [("signal", 1, "n1")]
    assert told["lost_s"] == told["restarts"][0]["down_s"] >= told["restarts"][0]["wait_s"] > 0.2
    assert "starting again in 0." in output


def test_ranks_that_left_stay_away_where_that_is_asked(tmp_path: Path, commands: Path) -> None:
    script = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    launcher = start(tmp_path, script, failure={"shutdown_grace": "1s", "no_retry_on": ["preempt"]}, **ONE)
    merged = tmp_path / "runs/j" / own(tmp_path.name) / "merged.log"
    assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2)
    os.kill(int((commands / "batch").read_text()), signal.SIGUSR2)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 75, output
    assert "queued again" not in output


ECC = "raise RuntimeError('CUDA error: uncorrectable ECC error encountered')"


def test_a_machine_that_is_at_fault_too_often_is_left_out_when_the_job_is_queued_again(
    tmp_path: Path, commands: Path
) -> None:
    script = "import os, time\nbad = int(os.environ['MESHWRIGHT_ATTEMPT']) < 2\n"
    script += f"if os.environ['RANK'] == '1' and bad: {ECC}\ntime.sleep(600 if bad else 0)"
    failure = {"max_restarts": 2, "exclude_bad_nodes": 2, "backoff": {"initial": "100ms"}, "shutdown_grace": "1s"}
    launcher = start(tmp_path, script, failure=failure, cluster={"type": "slurm", "exclude": ["n7"]})
    output = end(launcher, tmp_path)
    assert output.count("starting again in") == 2
    assert launcher.returncode == 0, output
    assert (commands / "updated").read_text() == "JobId=42 StartTime=now+15 ExcNodeList=n7,n1\n"
    assert "meshwright: it goes on without n1; job 42 is queued again" in output
    told = json.loads((tmp_path / "runs/j" / own(tmp_path.name) / "exit.json").read_text())
    assert [(each["kind"], each["host"]) for each in told["restarts"]] == [("node", "n1")] * 2
    assert [(each["node"], each["attempt"]) for each in told["excluded"]] == [("n1", 1)]
    assert "uncorrectable ECC error" in told["excluded"][0]["why"]
    assert told["excluded"][0]["down_s"] > 0
    assert told["attempts"] == 3


def test_a_job_that_is_not_to_be_queued_again_ends_with_what_happened(tmp_path: Path) -> None:
    script = f"import os, time\nif os.environ['RANK'] == '1': {ECC}\ntime.sleep(600)"
    failure = {"max_restarts": 2, "exclude_bad_nodes": 1, "shutdown_grace": "1s"}
    launcher = start(tmp_path, script, failure=failure, cluster={"type": "slurm", "requeue": False})
    output = end(launcher, tmp_path)
    assert launcher.returncode == 1, output
    assert "rank 1 on n1 failed first" in output


def test_an_elastic_run_is_queued_for_a_range_and_runs_on_the_nodes_it_gets(tmp_path: Path, commands: Path) -> None:
    up = tmp_path / "up"  # rank 2 fails when rank 0 has spoken
    script = f"import os, pathlib, time\nup = pathlib.Path({str(up)!r})\n"
    script += "print(os.environ['WORLD_SIZE'], 'ranks', flush=True)\nif os.environ['RANK'] == '0': up.touch()\n"
    script += "while not up.exists(): time.sleep(0.01)\n"
    script += f"if os.environ['RANK'] == '2': {ECC}\ntime.sleep(600 if os.environ['WORLD_SIZE'] == '3' else 0)"
    failure = {"max_restarts": 1, "exclude_bad_nodes": 1, "backoff": {"initial": "100ms"}, "shutdown_grace": "1s"}
    parallel = {"tp": 1, "dp": 3, "num_microbatches": 2}
    launcher = start(tmp_path, script, failure=failure, nodes={"min": 2, "max": 3}, parallel=parallel)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert "meshwright: Slurm gave 2 nodes; ranks run on 2" in output
    assert {"n0:0 | 3 ranks", "n0:0 | 2 ranks"} <= set(output.splitlines())
    run_dir = tmp_path / "runs/j" / own(tmp_path.name)
    told, job = (json.loads((run_dir / name).read_text()) for name in ("plan.json", "job.json"))
    assert [node["name"] for node in told["nodes"]] == ["n0", "n1"]
    assert "--nodes=2-3" in told["submission"]["argv"]
    assert {"--nodes=2", "--ntasks=2"} <= set(told["submission"]["step"])
    assert (job["nodes"], job["parallel"]["dp"], job["parallel"]["num_microbatches"]) == (2, 2, 3)


def _up_twice(folder: Path, **keys: object) -> "tuple[subprocess.Popen[str], Path]":
    """A launch with a secret whose two ranks are up, and wait as long as there is no file `again`."""
    script = (
        "import os, time\n"
        "print('up', os.environ['TOKEN'] == 's3cr3t', flush=True)\n"
        "end_s = time.time() + (1 if os.path.exists('again') else 600)\n"
        "while time.time() < end_s: time.sleep(0.1)\n"
    )
    keys = {"failure": {"shutdown_grace": "1s"}, **keys}
    launcher = start(folder, script, secrets={"TOKEN": {"from_env": "MY_TOKEN"}}, **keys)
    run_dir = folder / "runs/j" / own(folder.name)
    merged = run_dir / "merged.log"
    assert eventually(lambda: merged.exists() and merged.read_text().count("up True") >= 2)
    return launcher, run_dir


def test_a_job_that_slurm_itself_queues_again_keeps_its_secrets_until_its_end(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    launcher, run_dir = _up_twice(tmp_path, **ONE)
    (tmp_path / "again").touch()
    subprocess.run([commands / "scontrol", "requeue", "42"], check=True)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert "Slurm ended job 42 to start it again" in output
    assert (commands / "updated").read_text() == "JobId=42 StartTime=now+15\n", "Slurm would hold it"
    assert (run_dir / "merged.log").read_text().count("up True") == 4
    assert json.loads((run_dir / "exit-0.json").read_text())["state"] == "interrupted"
    assert json.loads((run_dir / "exit.json").read_text())["state"] == "succeeded"
    assert not (run_dir / "private/secrets.json").exists()


def test_a_job_that_is_cancelled_forgets_its_secrets(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    launcher, run_dir = _up_twice(tmp_path, **ONE)
    assert (run_dir / "private/secrets.json").exists()
    subprocess.run([commands / "scancel", "42"], check=True)
    output = end(launcher, tmp_path)
    assert json.loads((run_dir / "exit.json").read_text())["state"] == "interrupted", output
    assert not (run_dir / "private/secrets.json").exists()


@pytest.mark.parametrize("quicker", [False, True])
def test_a_first_node_that_is_cut_off_is_named_and_the_run_goes_on_when_slurm_hears_of_it_again(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch, quicker: bool
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    failure = {"max_restarts": 1, "shutdown_grace": "1s"}
    launcher, run_dir = _up_twice(tmp_path, failure=failure)
    (tmp_path / "again").touch()
    (commands / "cut-off").touch()
    with (run_dir / "private/step/node-0.jsonl").open("a") as file:
        file.write('{"event": "unheard", "of": 1}\n')
    assert eventually((run_dir / "exit-0.json").exists)
    assert not (run_dir / "exit.json").exists(), "it is not over"
    if quicker:  # Slurm has given the node up
        (commands / "requeue").touch()
    (commands / "cut-off").unlink()
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert "node n0: neither n1, for 10 s, nor the queue's controller was heard of" in output
    assert (run_dir / "merged.log").read_text().count("up True") == 4
    told = (commands / "updated").read_text() if (commands / "updated").exists() else ""
    assert ("ExcNodeList=n0" in told) != quicker, "a job that Slurm has queued again is not queued once more"


def _handed_over(folder: Path, *, word: str) -> Path:
    """The directory of a run that Slurm has, as far as its launcher is about to read it."""
    for name in ("private", "logs"):
        (folder / name).mkdir()
    plan = plan_slurm(replace(REQUEST, run_dir=folder), replace(OPTIONS, requeue=word == "--requeue"))
    (folder / "plan.json").write_text(json.dumps(plan.as_dict()))
    job = Job.model_validate({"name": "j", "command": ["true"], "cluster": {"type": "slurm"}})
    (folder / "job.json").write_text(json.dumps(job.as_dict()))
    (folder / "private/secrets.json").write_text('{"TOKEN": "s3cr3t"}')
    return folder


@pytest.fixture
def queued(tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job finds its run."""
    (commands / "times").write_text("0")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n0,n1")
    found = tmp_path / "run"
    found.mkdir()
    return found


@pytest.mark.parametrize(("says", "stay"), [("over", False), ("again", True), ("nothing", True)])
def test_a_launcher_that_fails_leaves_no_secrets_unless_slurm_starts_it_again_or_does_not_say(
    queued: Path, commands: Path, monkeypatch: pytest.MonkeyPatch, says: str, stay: bool
) -> None:
    def fail(*_: object, **__: object) -> Outcome:
        raise RunDirError("its logs cannot be written")

    monkeypatch.setattr("meshwright.launch.batch.follow", fail)
    if says == "again":
        (commands / "requeue").touch()
    if says == "nothing":
        monkeypatch.setattr("meshwright.launch.batch.times_queued_again", lambda job: None)
    run_dir = _handed_over(queued, word="--requeue")
    assert main([str(run_dir)]) == 74
    assert (run_dir / "private/secrets.json").exists() == stay


def test_a_job_that_runs_once_holds_its_secrets_on_disk_until_they_are_read(
    queued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def look(*_: object, **__: object) -> Outcome:
        seen.append(path.exists())
        sys.exit(9)

    monkeypatch.setattr("meshwright.launch.batch.follow", look)
    path = _handed_over(queued, word="--no-requeue") / "private/secrets.json"
    with pytest.raises(SystemExit, match="9"):
        main([str(path.parent.parent)])
    assert seen == [False]


def test_a_job_whose_launch_gave_up_ends_at_once_and_says_why(queued: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = _handed_over(queued, word="--requeue")
    (run_dir / "private/secrets.json").unlink()
    assert main([str(run_dir)]) == 74
    assert "secrets.json was taken away: the run is over, or its launch gave up" in capsys.readouterr().err
