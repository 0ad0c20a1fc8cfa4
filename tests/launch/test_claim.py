"""A run id that was given by hand is of one living run: another launch is refused, with who has it and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from meshwright.launch.claim import check_free, claimed
from meshwright.launch.runs import RunError, remember
from tests.launch.own import own
from tests.launch.test_runs import known
from tests.launch.typed import meshwright
from tests.launch.waiting import eventually, kill_all

pytestmark = pytest.mark.usefixtures("own_state")


def test_an_id_is_free_again_once_its_launch_has_ended_and_others_never_mind() -> None:
    with claimed(own("a")), claimed(own("b")), claimed(None), claimed(None):
        pass
    with claimed(own("a")):
        pass


def test_a_second_launch_is_refused_with_the_first_ones_process_and_what_to_do() -> None:
    run_id = own("twice")
    with claimed(run_id), pytest.raises(RunError) as caught, claimed(run_id):
        pass
    said = str(caught.value)
    assert f"--run-id {run_id}: a run of this id goes on: launcher {os.getpid()} on " in said
    assert f"Choose another --run-id or leave it out, or end that run first: meshwright cancel {run_id}" in said
    assert caught.value.exit_code == 64


def test_what_a_launch_leaves_in_the_background_holds_its_id() -> None:
    run_id = own("left")
    read, write = os.pipe()
    with claimed(run_id):
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with pytest.raises(RunError, match="goes on"), claimed(run_id):
            pass
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)
    with claimed(run_id):
        pass


def test_processes_of_a_run_that_nobody_remembers_are_seen() -> None:
    run_id = own("carried")
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(words, env={**os.environ, "MESHWRIGHT_RUN_ID": run_id})
    try:
        assert eventually(lambda: process.pid in carriers(run_id))
        with pytest.raises(RunError, match=f"process {process.pid} of this machine carries it"), claimed(run_id):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_run_directory_with_a_living_run_names_its_launcher(tmp_path: Path) -> None:
    made = known(tmp_path).of_this_process()
    remember(made)
    with pytest.raises(RunError, match=f"launcher {os.getpid()} on .*, in {made.run_dir} \\(running\\)"):
        check_free(Path(made.run_dir))
    Path(made.run_dir, "exit.json").write_text('{"state": "succeeded", "reason": "", "exit_code": 0}')
    check_free(Path(made.run_dir))
    check_free(tmp_path / "nothing")


@pytest.mark.slow
def test_two_launches_from_two_folders_do_not_end_each_other(tmp_path: Path) -> None:
    run_id = own(f"folders-{tmp_path.name}")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        job = {"name": "j", "command": ["python", "-c", "import time; time.sleep(600)"]}
        (tmp_path / name / "job.yaml").write_text(yaml.safe_dump(job))
    try:
        first = meshwright(tmp_path / "a", "launch", "job.yaml", "--run-id", run_id, "--detach")
        assert first.returncode == 0, first.stderr
        second = meshwright(tmp_path / "b", "launch", "job.yaml", "--run-id", run_id)
        assert second.returncode == 64, second.stdout
        assert "a run of this id goes on: launcher " in second.stderr
        assert not (tmp_path / "b/runs").exists()
        assert eventually(lambda: bool(list(carriers(run_id)))), "the first one lives"
        assert meshwright(tmp_path, "cancel", run_id).returncode == 0
        assert eventually(lambda: not list(carriers(run_id)))
    finally:
        kill_all(carriers(run_id))
