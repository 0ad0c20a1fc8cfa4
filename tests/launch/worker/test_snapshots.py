"""A checkpoint is whole or absent, wherever the program stops."""

import os
from pathlib import Path

import pytest

from meshwright.launch.worker import snapshots
from meshwright.launch.worker.snapshots import (
    Snapshot,
    damaged_file,
    describe_files,
    find_newest,
    partial_path,
    prune,
    read_snapshot,
    seal,
    sweep,
    write_durably,
)


class Stopped(BaseException):
    """The program ends here."""


def _write(directory: Path, step: int, text: str) -> Snapshot:
    partial = partial_path(directory, step)
    partial.mkdir(parents=True)
    write_durably(partial / "data", text)
    return seal(partial, step, {"files": describe_files(partial, ["data"])})


def _newest(directory: Path) -> list[int]:
    return [snapshot.step for snapshot in find_newest(directory, say=lambda _: None)]


@pytest.mark.parametrize("moment", range(12))
def test_a_save_stopped_between_any_two_file_operations_leaves_the_older_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    _write(tmp_path, 1, "one")
    left = [moment]

    def counting(function):
        def operation(*args, **kwargs):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return function(*args, **kwargs)

        return operation

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (os, "open")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    try:
        _write(tmp_path, 2, "two")
        prune(tmp_path, 1)
    except Stopped:
        pass
    monkeypatch.undo()
    steps = _newest(tmp_path)
    assert steps in ([1], [2, 1], [2])
    for snapshot in find_newest(tmp_path, say=lambda _: None):
        assert (snapshot.path / "data").read_text() == {1: "one", 2: "two"}[snapshot.step]
        assert damaged_file(snapshot, ["data"]) is None
    sweep(tmp_path)
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
    assert _newest(tmp_path) == steps


def test_what_is_not_whole_is_named_and_left_out(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _write(tmp_path, step, "x" * 10)
    (tmp_path / "step-00000003" / "data").write_text("short")
    (tmp_path / "step-00000002" / snapshots.MANIFEST).write_text("{")
    said: list[str] = []
    assert [each.step for each in find_newest(tmp_path, said.append)] == [1]
    assert "has 5 bytes instead of 10" in said[0]
    assert "cannot be read" in said[1]
    assert read_snapshot(tmp_path / "nowhere") == "it has no manifest.json"


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    snapshot = _write(tmp_path, 1, "abc")
    (snapshot.path / "data").write_text("abd")
    found = read_snapshot(snapshot.path)
    assert isinstance(found, Snapshot)
    assert damaged_file(found, ["data"]) == "data"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        _write(tmp_path, step, "x")
    prune(tmp_path, 2)
    assert _newest(tmp_path) == [5, 4]
