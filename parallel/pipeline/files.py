"""Schedules that users wrote, or that `torch.distributed.pipelining` did, from files."""

import csv
from pathlib import Path

from meshwright.parallel.errors import ScheduleError, nearest
from meshwright.parallel.pipeline.actions import Schedule

__all__ = ["is_file", "read_schedule"]

_ENDING = ".csv"


def is_file(schedule: object) -> bool:
    """Whether `schedule=` names a file.

    >>> is_file("orders/mine.csv"), is_file("1f1b")
    (True, False)
    """
    return isinstance(schedule, Path) or (isinstance(schedule, str) and schedule.endswith(_ENDING))


def read_schedule(path: str | Path) -> Schedule:
    """Reads a file of one line for each rank (see `Schedule.read`); whether it can be run, `check` tells.

    Raises:
        ScheduleError: naming the file; line and cell where it is no schedule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = sorted(str(each) for each in Path(path).parent.glob(f"*{_ENDING}"))
        hint = nearest(str(path), others) if others else f"no file beside it ends in {_ENDING}"
        raise ScheduleError(f"schedule file {path} does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise ScheduleError(
            f"schedule file {path} cannot be read ({error}); write a line of actions such as 0F0,0B0 for each rank"
        ) from error
    if not text.strip():
        raise ScheduleError(f"schedule file {path} is empty; write a line of actions such as 0F0,0B0 for each rank")
    try:
        return Schedule.read(text.rstrip() + "\n", name=str(path))
    except (ScheduleError, csv.Error) as error:
        raise ScheduleError(f"schedule file {path}: {error}") from error
