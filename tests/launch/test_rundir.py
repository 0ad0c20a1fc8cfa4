"""A run directory is private, new, and its files are whole or absent."""

import os
from pathlib import Path

import pytest

from meshwright.launch.rundir import RunDirError, create_run_dir, make_run_id, write_text


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
