"""What became of the runs of a sweep, as a table: read from their directories, whoever ran them."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from meshwright.clusters.records import log_end
from meshwright.launch.looks import Looks
from meshwright.launch.rundir import write_json
from meshwright.launch.runs import Known, read_run, standing
from meshwright.launch.supervise import Interrupts, now_unix_s
from meshwright.launch.values import format_duration
from meshwright.launch.watch import LAST_LINE
from meshwright.parallel.errors import MeshwrightError

__all__ = ["SWEEP_FILE", "Row", "Screen", "conclude", "follow_array", "row_of", "rows_of", "table", "worst"]

SWEEP_FILE = "sweep.json"
"""What a sweep started, in its own directory."""

_LOOK_S = 0.5


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        run_id: of the run.
        values: of its sweep, "key=value ...".
        state: of its exit record, or how it stands.
        exit_code: None while it is not over, or was never started.
        loss: the last one it wrote down.
        duration_s: from its start to its end.
        run_dir: of the run.
    """

    run_id: str
    values: str
    state: str
    exit_code: int | None
    loss: float | None
    duration_s: float | None
    run_dir: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def row_of(run_id: str, values: str, run_dir: Path) -> Row:
    """How a run stands, by what lies in its directory."""
    known = read_run(run_dir)
    if known is None:
        return Row(run_id, values, "not started", None, None, None, str(run_dir))
    now = standing(known)
    return Row(run_id, values, now.state, now.exit_code, _last_loss(run_dir), _duration_s(run_dir), str(run_dir))


def _last_loss(run_dir: Path) -> float | None:
    for line in reversed(log_end(run_dir / "metrics.jsonl").splitlines()):
        try:
            return float(json.loads(line)["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # the cut start of a line, or a record without one
    return None


def _duration_s(run_dir: Path) -> float | None:
    try:
        record = json.loads((run_dir / "exit.json").read_text())
        return round(float(record["ended_unix_s"]) - float(record["started_unix_s"]), 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def worst(rows: Sequence[Row]) -> int:
    """The exit code of a sweep: the largest of its runs'.

    >>> worst([Row("r-0", "a=1", "succeeded", 0, None, 1.0, "d"), Row("r-1", "a=2", "failed", 7, None, 1.0, "d")])
    7
    """
    return max((row.exit_code or 0 for row in rows), default=0)


def table(rows: Sequence[Row]) -> str:
    """The rows for people.

    >>> print(table([Row("r1-0", "lr=0.1", "succeeded", 0, 3.25, 61.0, "d")]))
    RUN   VALUES  STATE      LOSS    DURATION
    r1-0  lr=0.1  succeeded  3.2500  1m1s
    """
    cells = [("RUN", "VALUES", "STATE", "LOSS", "DURATION"), *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    state = f"{row.state} ({row.exit_code})" if row.exit_code else row.state
    loss = "-" if row.loss is None else f"{row.loss:.4f}"
    return row.run_id, row.values, state, loss, "-" if row.duration_s is None else format_duration(row.duration_s)


def rows_of(known: Known) -> list[Row]:
    """How the runs of a sweep stand, in its order."""
    told = json.loads(Path(known.run_dir, SWEEP_FILE).read_text())
    return [row_of(run["run_id"], " ".join(run["set"]), Path(run["run_dir"])) for run in told["runs"]]


class Screen:
    """Prints lines about a sweep, and keeps them in its merged.log.

    Args:
        directory: of the sweep.
        screen: where people read.
    """

    def __init__(self, directory: Path, screen: TextIO) -> None:
        self._log, self._screen = directory / "merged.log", screen

    def __call__(self, line: str) -> None:
        """Prints one line, whether or not anybody reads it."""
        with self._log.open("a") as file:
            file.write(f"{line}\n")
        with suppress(BrokenPipeError):
            self._screen.write(f"{line}\n")
            self._screen.flush()


def conclude(known: Known, screen: Callable[[str], None], *, as_json: bool, code: int | None = None) -> int:
    """Writes the exit record of a sweep and says what became of it; returns its exit code.

    Args:
        known: the sweep.
        screen: takes lines for people.
        as_json: one JSON object on standard output besides.
        code: where the sweep was interrupted; None follows from its runs.
    """
    rows = rows_of(known)
    bad = sum(row.state != "succeeded" for row in rows)
    state = "interrupted" if code is not None else "failed" if bad else "succeeded"
    code = worst(rows) if code is None else code
    reason = f"{bad} of {len(rows)} runs did not succeed" if bad else ""
    told = {"run_id": known.run_id, "state": state, "exit_code": code, "reason": reason}
    times = {"started_unix_s": known.started_unix_s, "ended_unix_s": now_unix_s()}
    record = {**told, **times, "runs": [row.as_dict() for row in rows]}
    write_json(Path(known.run_dir, "exit.json"), record)
    for line in table(rows).splitlines():
        screen(line)
    screen(f"{LAST_LINE}{known.run_dir}")
    if as_json:
        sys.stdout.write(json.dumps({**record, "run_dir": known.run_dir}) + "\n")
    return code


def follow_array(known: Known, *, interrupted: Callable[[], object] | None = None, as_json: bool = False) -> int:
    """Says which runs of a sweep in a queue start and end, until it is over; returns its exit code.

    Args:
        known: the sweep.
        interrupted: what Ctrl-C does; None lets it end the looking only.
        as_json: one JSON object on standard output.
    """
    screen = Screen(Path(known.run_dir), sys.stderr if as_json else sys.stdout)
    said: set[str] = set()
    with Interrupts() if interrupted else nullcontext() as interrupts:
        numbers = [] if interrupts is None else interrupts.numbers
        asked, looks = 0, Looks(known)
        while not looks.over:
            if len(numbers) > asked and interrupted is not None:
                asked = len(numbers)
                with suppress(MeshwrightError):  # it may be over by now
                    interrupted()
            _news(known, screen, said)
            looks.news()
            time.sleep(_LOOK_S)
    return _end_of(known, screen, numbers, as_json=as_json)


def _end_of(known: Known, screen: Callable[[str], None], numbers: Sequence[int], *, as_json: bool) -> int:
    if Path(known.run_dir, "exit.json").exists():  # somebody else looked to its end
        return int(standing(known).exit_code or 0)
    return conclude(known, screen, as_json=as_json, code=128 + numbers[0] if numbers else None)


def _news(known: Known, screen: Callable[[str], None], said: set[str]) -> None:
    for run_dir in map(Path, known.runs):
        for name, word in (("launcher.log", "started"), ("exit.json", "ended")):
            line = f"{run_dir.name} {word}"
            if line not in said and (run_dir / name).exists():
                said.add(line)
                screen(line)
