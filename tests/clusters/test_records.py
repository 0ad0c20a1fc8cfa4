"""What ranks left behind is read as far as it is whole and of this attempt."""

import json
from pathlib import Path

from meshwright.clusters.records import error_records, hang_record
from meshwright.launch.rundir import create_run_dir


def test_error_records_of_an_earlier_attempt_or_half_written_are_left_out(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    told = {"rank": 0, "time_unix_s": 5.0, "type": "E", "message": "m", "traceback": "TB\n", "exit_code": 65}
    (tmp_path / "r1/errors/rank-0.json").write_text(json.dumps(told))
    (tmp_path / "r1/errors/rank-1.json").write_text('{"rank": 1')
    assert error_records(tmp_path / "r1", since_unix_s=6.0) == {}
    found = error_records(tmp_path / "r1", since_unix_s=4.0)
    assert (found[0].traceback, found[0].exit_code, list(found)) == ("TB", 65, [0])


def test_a_hang_is_read_unless_it_is_broken_or_of_an_earlier_attempt(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    told = {"found_by": 0, "line": "hang: it", "suspects": [1], "ranks": {"0": "waits"}, "stacks": {}}
    for attempt, time_s in enumerate((10.0, 20.0)):
        (tmp_path / f"r1/errors/hang-{attempt}.json").write_text(json.dumps({**told, "time_unix_s": time_s}))
    (tmp_path / "r1/errors/hang-2.json").write_text("{")
    found = hang_record(tmp_path / "r1", 15.0)
    assert found is not None
    assert (found.time_unix_s, found.suspects, found.ranks) == (20.0, (1,), {0: "waits"})
    assert hang_record(tmp_path / "r1", 25.0) is None
