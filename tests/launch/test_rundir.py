"""A run directory is private, new, and its files are whole or absent."""

import json
import os
from pathlib import Path

import pytest

from meshwright.launch.rundir import RunDirError, create_run_dir, error_records, hang_record, make_run_id, write_text


def test_only_its_user_can_read_a_run_directory(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_run_dir(tmp_path / "a/b")
        write_text(tmp_path / "a/b/file", "text")
    finally:
        os.umask(before)
    found = [tmp_path / "a/b", *(tmp_path / "a/b").iterdir()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in found)
    assert sorted(path.name for path in found[1:]) == ["errors", "file", "logs", "private", "ranks"]


def test_a_run_directory_is_never_taken_twice(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    with pytest.raises(RunDirError, match="exists already") as caught:
        create_run_dir(tmp_path / "r1")
    assert caught.value.exit_code == 74


def test_where_nothing_can_be_made_the_error_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"logs\.dir: the run directory .*file/r1 cannot be made: .* set logs\.dir"):
        create_run_dir(tmp_path / "file" / "r1")


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot be written"):
        write_text(tmp_path / "none/file", "text")
    (tmp_path / "file").write_text("old")
    (tmp_path / ".file.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert not (tmp_path / "elsewhere").exists()


def test_ids_differ_within_a_second_and_sort_by_time() -> None:
    assert make_run_id(0.0) != make_run_id(0.0)
    assert make_run_id(1e9) < make_run_id(2e9)


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
