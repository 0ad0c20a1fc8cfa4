"""A machine whose GPU goes bad under a run is named at once, kept in the record, and left out where that is allowed."""

import json
from pathlib import Path

import pytest

from meshwright.launch.health_lines import HealthLines
from meshwright.launch.supervise import RunState
from tests.lab.nvml import with_gpus
from tests.launch.test_launch import RUN, run, write_job
from tests.launch.test_relaunch import plan

FAULT = {"event": "health", "node": "node1", "fault": "GPU 1: lost", "found": "GPU 1: lost", "time_unix_s": 5.0}
NOTHING = {**FAULT, "node": "node0", "fault": None, "found": "no GPU to watch: no driver"}


def test_faults_are_kept_and_said_once_and_nothing_to_watch_is_only_said(tmp_path: Path) -> None:
    state, said = RunState(plan()), list[str]()
    lines = HealthLines(tmp_path, lambda text: text.replace("lost", "***"), said.append)
    for event in (NOTHING, FAULT):
        state.observe(dict(event))
    lines(state)
    state.observe(dict(FAULT))  # of an agent that was started again
    lines(state)
    assert said == [
        "meshwright: health of node0: no GPU to watch: no driver",
        "meshwright: health of node1: GPU 1: ***",
    ]
    kept = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert kept == [{"node": "node1", "fault": "GPU 1: ***", "time_unix_s": 5.0}]
    assert state.losses.sick == {"node1": "GPU 1: lost"}


SCRIPT = "import os, time\ntime.sleep(600 if os.environ['MESHWRIGHT_ATTEMPT'] == '0' else 0)"


@pytest.mark.slow
def test_a_run_goes_on_without_the_machine_whose_gpu_went_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in with_gpus("gpus=3 1.uncorrected=2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    keys = {
        "nodes": 2,
        "nproc_per_node": 1,
        "cluster": {"simulate_nodes": 3, "gpus_per_node": 1},
        "failure": {
            "max_restarts": 2,
            "exclude_bad_nodes": 5,
            "backoff": {"initial": "100ms"},
            "shutdown_grace": "1s",
        },
        "health": {"watch": {"interval": "500ms", "on_fault": "restart"}},
    }
    done = run(write_job(tmp_path, SCRIPT, **keys))
    assert done.returncode == 0, done.stderr
    fault = "GPU 1 (0000:3b:00): 2 uncorrected memory errors since the driver was loaded"
    assert f"meshwright: health of node1: {fault}" in done.stderr
    told = json.loads((tmp_path / f"runs/j/{RUN}/exit.json").read_text())
    assert [(each["node"], each["fault"]) for each in told["health"]] == [("node1", fault)]
    assert [(each["node"], each["why"]) for each in told["excluded"]] == [("node1", fault)]
    assert told["restarts"][0]["down_s"] > 0
    assert "node2 in place of node1" in told["restarts"][0]["reason"]
