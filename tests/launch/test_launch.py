"""Real launches on this machine: exit codes, blame, logs, clean-up."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from tests.launch.own import own
from tests.launch.waiting import eventually, least_s

pytestmark = pytest.mark.slow

RUN = own("r")
REPORT_LIMIT_S = 2.0
"""A local crash of one rank: all ranks gone and the report printed within this time."""


def words(job: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "meshwright.launch.cli", "launch", str(job), *more]


def write_job(folder: Path, script: str, **keys: object) -> Path:
    job = {"name": "j", "command": ["python", "-c", script], "nproc_per_node": 2, **keys}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, allow_unicode=True))
    return path


def run(job: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(job, "--run-id", RUN, *more),
        cwd=job.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"runs/j/{RUN}/exit.json").read_text())
    return found


def start(job: Path, run_id: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words(job, "--run-id", run_id),
        cwd=job.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_success_leaves_logs_a_merged_stream_a_plan_and_a_record(tmp_path: Path) -> None:
    script = "import os; print('\\x1b[31mhello\\x1b[0m', os.environ['RANK'], os.environ['MESHWRIGHT_ATTEMPT'])"
    job = write_job(tmp_path, script, cluster={"simulate_nodes": 2}, nproc_per_node=1)
    done = run(job)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"runs/j/{RUN}"
    assert sorted((folder / "merged.log").read_text().splitlines()) == ["node0:0 | hello 0 0", "node1:1 | hello 1 0"]
    assert sorted(line for line in done.stdout.splitlines() if "|" in line) == [
        "node0:0 | hello 0 0",
        "node1:1 | hello 1 0",
    ]
    assert (folder / "logs/rank-1.log").read_bytes() == b"\x1b[31mhello\x1b[0m 1 0\n"
    assert record(tmp_path)["state"] == "succeeded"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert f"run directory: {folder}" in done.stdout
    shown = subprocess.run(
        words(job, "--run-id", RUN, "--dry-run", "--json"), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout) == json.loads((folder / "plan.json").read_text())


def test_the_exit_code_is_the_failing_ranks_own_and_its_traceback_comes_first(tmp_path: Path) -> None:
    script = "import os, sys, time\nif os.environ['RANK'] == '1': raise SystemExit(7)\ntime.sleep(60)"
    done = run(write_job(tmp_path, script), "--json")
    assert done.returncode == 7
    told = json.loads(done.stdout)
    assert told["first_failure"]["rank"] == 1
    assert [victim["rank"] for victim in told["victims"]] == [0]
    assert "was ended by the launcher" in done.stderr


def test_a_signal_is_128_plus_its_number(tmp_path: Path) -> None:
    script = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    done = run(write_job(tmp_path, script))
    assert done.returncode == 137
    assert "killed by SIGKILL" in done.stderr


def test_a_culprit_that_is_still_tearing_down_is_blamed_before_the_peer_that_lost_it(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, time, traceback\n"
        "raised = pathlib.Path('raised')\n"
        "if os.environ['RANK'] == '1':\n"
        "    try: raise KeyError('the cause')\n"
        "    except KeyError: traceback.print_exc()\n"
        "    raised.touch()\n"
        "    time.sleep(60)\n"
        "while not raised.exists(): time.sleep(0.01)\n"
        "raise RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234')\n"
    )
    done = run(write_job(tmp_path, script))
    assert done.returncode == 1
    assert done.stderr.index("KeyError: 'the cause'") < done.stderr.index("victim: rank 0")
    first = record(tmp_path)["first_failure"]
    assert isinstance(first, dict)
    assert first["rank"] == 1


def test_an_error_record_outweighs_the_order_of_deaths(tmp_path: Path) -> None:
    script = (
        "import json, os, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    told = dict(rank=0, host='x', time_unix_s=time.time(), type='E', message='m', traceback='TB of 0',\n"
        "                exit_code=65)\n"
        "    open(os.environ['MESHWRIGHT_RUN_DIR'] + '/errors/rank-0.json', 'w').write(json.dumps(told))\n"
        "    time.sleep(60)\n"
        "time.sleep(1); sys.exit(9)\n"
    )
    done = run(write_job(tmp_path, script))
    assert done.returncode == 65
    assert "TB of 0" in done.stderr


def test_a_crash_is_reported_and_every_rank_gone_in_two_seconds(tmp_path: Path) -> None:
    taken_s = least_s(lambda number: _crash_s(tmp_path / str(number)), REPORT_LIMIT_S)
    assert taken_s < REPORT_LIMIT_S, f"{taken_s:.2f} s from the crash to the end of the launcher"


def _crash_s(folder: Path) -> float:
    """Seconds from the crash of one of four ranks to the end of the launcher."""
    folder.mkdir()
    script = (
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.sleep(1); print('crash', time.time(), flush=True); raise SystemExit(3)\n"
        "time.sleep(60)\n"
    )
    done = run(write_job(folder, script, nproc_per_node=4))
    ended_unix_s = time.time()
    crash = next(line for line in done.stdout.splitlines() if "crash" in line)
    assert done.returncode == 3
    assert not list(carriers(RUN))
    return ended_unix_s - float(crash.split()[-1])


ESCAPE = (
    "import os, subprocess, sys, time\n"
    "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
    "subprocess.Popen(child); subprocess.Popen(child, start_new_session=True)\n"
    "print('up', flush=True); time.sleep(600)\n"
)


@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_sigkill_of_launcher_or_agent_leaves_nothing(tmp_path: Path, victim: str) -> None:
    run_id = f"kill-{victim}-{os.getpid()}"
    launcher = start(write_job(tmp_path, ESCAPE), run_id)
    try:
        assert eventually(lambda: len(list(carriers(run_id))) == 6), "two ranks with two children each"
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(launcher.pid if victim == "launcher" else int(children[0]), signal.SIGKILL)
        assert eventually(lambda: not list(carriers(run_id)), 5.0), list(carriers(run_id))
        output, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    if victim == "agent":
        assert launcher.returncode == 69
        assert "the agent of" in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_ranks_with_grace_and_says_so(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run_id = f"stop-{number}-{os.getpid()}"
    script = (
        "import os, signal, sys, time\n"
        "def stop(*_): print('saved', os.environ['RANK'], flush=True); sys.exit(0)\n"
        "if os.environ['RANK'] == '0': signal.signal(signal.SIGTERM, stop)\n"
        "else: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    launcher = start(write_job(tmp_path, script, failure={"shutdown_grace": "1s"}), run_id)
    merged = tmp_path / "runs/j" / run_id / "merged.log"
    try:
        assert eventually(lambda: merged.exists() and merged.read_text().count("up") == 2)
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == code, output
    told = json.loads((merged.parent / "exit.json").read_text())
    assert (told["state"], told["exit_code"]) == ("interrupted", code)
    assert "saved 0" in merged.read_text()
    assert not list(carriers(run_id))


@pytest.mark.parametrize("nodes", [1, 2])
def test_restarts_count_once_for_the_whole_job_and_keep_their_logs(tmp_path: Path, nodes: int) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "rank, attempt = os.environ['RANK'], os.environ['MESHWRIGHT_ATTEMPT']\n"
        "print('attempt', attempt, flush=True)\n"
        f"spoke = pathlib.Path({str(tmp_path)!r}, 'spoke-' + attempt)\n"
        "if rank == '0': spoke.touch()\n"
        "while not spoke.exists(): time.sleep(0.01)\n"  # a rank killed before it began would leave no log
        "if rank == '1' and attempt != '2': sys.exit(5)\n"
        "time.sleep(0.5 if attempt == '2' else 60)\n"
    )
    keys = {"failure": {"max_restarts": 2}, "cluster": {"simulate_nodes": nodes}, "nproc_per_node": 2 // nodes}
    done = run(write_job(tmp_path, script, **keys))
    assert done.returncode == 0, done.stderr
    assert record(tmp_path)["attempts"] == 3
    logs = tmp_path / f"runs/j/{RUN}/logs"
    for rank in (0, 1):
        assert [
            (logs / name).read_text().split()[-1]
            for name in (f"rank-{rank}.log", f"rank-{rank}.attempt-1.log", f"rank-{rank}.attempt-2.log")
        ] == ["0", "1", "2"]


@pytest.mark.parametrize(("action", "attempts"), [("dump_and_restart", 2), ("dump_and_stop", 1)])
def test_a_hang_is_restarted_or_not_as_asked(tmp_path: Path, action: str, attempts: int) -> None:
    failure = {"max_restarts": 1, "hang": {"no_progress_for": "90s", "action": action}}
    cluster = {"simulate_nodes": 2}
    script = (
        "import os, sys\n"
        "given = os.environ['MESHWRIGHT_HANG_S'], os.environ['MESHWRIGHT_HANG_ACTION']\n"
        f"sys.exit(125 if given == ('90.0', {action!r}) else 3)"
    )
    done = run(write_job(tmp_path, script, failure=failure, cluster=cluster, nproc_per_node=1))
    assert done.returncode == 125, done.stderr
    assert record(tmp_path)["attempts"] == attempts
    assert "failure.hang had nothing to go by: no rank called meshwright's start_ranks" in done.stderr


def test_that_hangs_of_a_program_may_not_be_seen_is_said_while_it_runs(tmp_path: Path) -> None:
    script = (
        "import pathlib, time\nend = time.time() + 30\n"
        "while not pathlib.Path('said').exists() and time.time() < end: time.sleep(0.05)"
    )
    job = write_job(tmp_path, script, failure={"hang": {"no_progress_for": "90s"}}, nproc_per_node=1)
    with start(job, RUN) as running:
        assert any("hangs of a program that does not call it are not" in line for line in running.stdout or ())
        (tmp_path / "said").touch()


def test_a_failed_setup_is_no_failed_rank(tmp_path: Path) -> None:
    done = run(write_job(tmp_path, "pass", setup="echo preparing; false; echo unreachable"))
    assert done.returncode == 70
    assert "setup failed" in done.stderr
    assert "preparing" in done.stderr
    assert "rank" not in done.stderr.replace("setup-", "")
    assert not list((tmp_path / f"runs/j/{RUN}/logs").glob("rank-*"))


def test_setup_changes_the_environment_and_words_secrets_and_env_pass_arrive(tmp_path: Path) -> None:
    odd = "a b'c\"d$HOME $$ ${local_rank} ü \\ ;|&\nnext"
    script = (
        "import json, os, sys\n"
        "keep = ['MADE', 'TOKEN', 'WANTED', 'UNWANTED', 'OMP_NUM_THREADS', 'PWD_']\n"
        "told = {'argv': sys.argv[1:], 'env': {name: os.environ.get(name) for name in keep}}\n"
        "open(os.environ['MESHWRIGHT_RANK_DIR'] + '/told.json', 'w').write(json.dumps(told))\n"
        "print('the token is', os.environ['TOKEN'])\n"
    )
    keys = {
        "command": [sys.executable, "-c", script, odd, ""],
        "setup": "export MADE='by setup'",
        "env_pass": ["WANT*"],
        "secrets": {"TOKEN": {"from_env": "MY_TOKEN"}},
    }
    done = run(write_job(tmp_path, script, **keys), MY_TOKEN="hunter22-secret", WANTED="1", UNWANTED="1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"runs/j/{RUN}"
    told = json.loads((folder / "ranks/1/told.json").read_text())
    assert told["argv"] == [odd, ""]
    env = told["env"]
    assert (env["MADE"], env["TOKEN"], env["WANTED"], env["UNWANTED"]) == ("by setup", "hunter22-secret", "1", None)
    assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert "the token is ***" in done.stdout
    for name in ("merged.log", "plan.json", "job.json", "job.yaml", "exit.json"):
        assert "hunter22" not in (folder / name).read_text(), name


def test_a_command_that_does_not_exist_is_127(tmp_path: Path) -> None:
    done = run(write_job(tmp_path, "", command=["no-such-program", "x"]))
    assert done.returncode == 127
    assert "cannot start 'no-such-program'" in done.stderr


def test_a_port_in_use_and_an_unwritable_directory_have_their_own_codes(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(write_job(tmp_path, "pass", rendezvous={"port": port}))
    assert done.returncode == 76
    assert f"port {port}" in done.stderr
    (tmp_path / "file").write_text("")
    done = run(write_job(tmp_path, "pass", logs={"dir": "file/{run_id}"}))
    assert done.returncode == 74
    assert "cannot be made" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sweep", [{}, {"sweep": {"grid": {"env.A": ["1", "2"]}}}])
def test_a_store_that_everybody_could_join_is_warned_about_at_the_launch(
    tmp_path: Path, sweep: dict[str, object]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "bin/ssh").chmod(0o755)
    hosts = {"type": "ssh", "hosts": [{"name": "h1"}, {"name": "h2"}]}
    job = write_job(tmp_path, "", nproc_per_node=1, cluster=hosts, rendezvous={"bind": "any"}, env={"A": "0"}, **sweep)
    done = run(job, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    warned = "rendezvous.bind: the first node listens on every interface (whoever reaches the port can join)"
    assert done.returncode == 69, done.stderr
    assert done.stderr.count(warned) == 1
