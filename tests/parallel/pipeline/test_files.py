"""A file of a schedule is read, or refused with its name and the place of what is wrong."""

from pathlib import Path

import pytest

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.files import read_schedule
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_v


def test_what_was_written_is_read(tmp_path: Path) -> None:
    schedule = lowered(zero_bubble_v([0, 1, 1, 0], 3), zero_stage=3)
    file = tmp_path / "mine.csv"
    file.write_text("\ufeff" + schedule.write() + "\n\n")  # a mark of some editors, and empty lines, which are no ranks
    found = read_schedule(str(file))
    assert (found.homes, found.ranks, found.name) == (schedule.homes, schedule.ranks, str(file))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"0F0,0B0\n1F0,1X0\n", "line 2, cell 2: '1X0' is no action; write stage"),
        (b"0F0,0B0\n1F,1B0\n", "line 2, cell 1: action F of stage 1 takes a micro-batch, not None"),
        (b"0F0,1B0\n1F0,0B0\n", "1B0 on rank 0: stage 1 is run by rank 1"),
        (b"0F0,0F1\n2F0,2F1\n", r"no rank runs forward of stages \[1\]"),
        (b" \n", "is empty; write a line"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused_with_the_place(content: bytes, why: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(content)
    with pytest.raises(ScheduleError, match=rf"schedule file {file}.*{why}"):
        read_schedule(file)


def test_a_file_that_is_missing_or_none_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"does not exist; no file beside it ends in .csv"):
        read_schedule(tmp_path / "mein.csv")
    (tmp_path / "mine.csv").write_text("0F0,0B0")
    with pytest.raises(ScheduleError, match=rf"mein.csv does not exist; did you mean '{tmp_path}/mine.csv'"):
        read_schedule(tmp_path / "mein.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ScheduleError, match="cannot be read"):
        read_schedule(tmp_path / "folder.csv")
