"""Machines that were left out, taken back or at fault are told of, while a run lasts and after it."""

import json
from pathlib import Path

import pytest

from meshwright.launch.page.machines import MachineEvent, machine_events
from tests.launch.page.made import write

LOST = {"node": "h2", "why": "host h2: the connection was lost", "attempt": 0, "step": 1200, "time_unix_s": 20.0}
BACK = {**LOST, "back_unix_s": 40.0}
FAULT = {"node": "h3", "fault": "GPU 1: lost", "time_unix_s": 30.0}
EVENTS = (
    MachineEvent("h2", 20.0, "left out at step 1,200: host h2: the connection was lost"),
    MachineEvent("h3", 30.0, "GPU 1: lost"),
    MachineEvent("h2", 40.0, "there again, and taken back"),
)


def test_the_exit_record_tells_by_time_what_became_of_machines(tmp_path: Path) -> None:
    assert machine_events(tmp_path, {"state": "succeeded", "health": [FAULT], "excluded": [BACK]}) == EVENTS


def test_while_a_run_lasts_its_files_tell(tmp_path: Path) -> None:
    write(tmp_path / "excluded.json", [LOST])
    (tmp_path / "health.jsonl").write_text(json.dumps(FAULT) + '\n{"node": "h3", "fau')
    assert machine_events(tmp_path, {}) == EVENTS[:2]
    assert machine_events(tmp_path, {"state": "succeeded"}) == (), "an exit record is the last word"


@pytest.mark.parametrize("strange", [None, 3, "x", [], [3], {"node": "h2"}, [{}], [{"time_unix_s": "x", "step": []}]])
def test_strange_files_tell_less(tmp_path: Path, strange: object) -> None:
    write(tmp_path / "excluded.json", strange)
    write(tmp_path / "health.jsonl", strange)
    for ended in ({}, {"health": strange, "excluded": strange}):
        assert all(each.time_unix_s is None for each in machine_events(tmp_path, ended))
