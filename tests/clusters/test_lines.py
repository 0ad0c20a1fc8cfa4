"""A line is whole or not there; what found no room comes later, and what is torn all the same is skipped and said."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshwright.clusters.lines import Lines, Tail, write_all


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond this size: the kernel writes a part, and then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_finds_no_room_is_not_there_in_part_and_comes_in_its_order_once_there_is(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines, tail = Lines(path), Tail(path, "event")
    assert lines.add({"event": "first"})
    size = path.stat().st_size
    with room(size + 10):
        assert not lines.add({"event": "second"})
        assert not lines.add({"event": "third"})
        assert path.stat().st_size == size
        assert not lines.flush()
    assert lines.flush()
    assert lines.add({"event": "fourth"})
    assert [each["event"] for each in tail.read()] == ["first", "second", "third", "fourth"]


def test_a_file_that_cannot_be_opened_yet_loses_nothing(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "later/lines")
    assert not lines.add({"event": "first"})
    (tmp_path / "later").mkdir()
    assert lines.add({"event": "second"})
    assert [each["event"] for each in Tail(tmp_path / "later/lines", "event").read()] == ["first", "second"]


def test_a_write_that_takes_only_a_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("meshwright.clusters.lines.os.write", lambda held, data: write(held, data[:3]))
    write_all(tmp_path / "lines", [b'{"event": "whole"}\n'])
    monkeypatch.undo()
    assert Tail(tmp_path / "lines", "event").read() == [{"event": "whole"}]


@pytest.mark.parametrize(
    "torn", [b'{"event": "exi{"event": "result"}', b"7", b'["event"]', b'{"no": 1}', b"\xff\xfe", b"x"]
)
def test_a_line_that_is_torn_is_skipped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: bytes
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"event": "first"}\n' + torn + b'\n\n{"event": "last"}\n{"event": "unfin')
    tail = Tail(path, "event")
    assert [each["event"] for each in tail.read()] == ["first", "last"]
    assert capsys.readouterr().err == f"meshwright: {path}: a line is torn, and skipped: {torn!r}\n"
    with path.open("ab") as file:
        file.write(b'ished"}\n')
    assert tail.read() == [{"event": "unfinished"}]
    assert tail.read() == []
