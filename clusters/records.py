"""What ranks leave behind on the disk: error records, what was found of a hang, the ends of logs, how far they came."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from meshwright.clusters.blame import ErrorRecord, HangRecord
from meshwright.parallel.progress import at_step

__all__ = ["clean_line", "error_records", "hang_record", "last_words", "log_end", "newest_step"]

_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # OSC and other strings
    r"|\x1b[ -/]*[0-~]"  # two-character sequences
)
_NUMBERED = re.compile(r"(?<!\.)([0-9]{1,15})(?:\.(?:pt|pth|ckpt|safetensors))?$")
_MOST_WORDS = 300
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean_line(raw: bytes) -> str:
    """One line of output as text that is safe on a terminal.

    >>> clean_line(b"\\x1b[31mred\\x1b[0m\\ttab")
    'red\\ttab'
    >>> clean_line(b" 10%|#   |\\r 20%|##  |\\r")
    ' 20%|##  |'
    """
    text = _SEQUENCES.sub("", raw.decode("utf-8", "replace"))
    states = [state for state in text.split("\r") if state.strip()]
    return _CONTROLS.sub("", states[-1] if states else "")


def log_end(path: Path, max_bytes: int = 1 << 16) -> str:
    """The clean end of a log; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            data = file.read()
    except OSError:
        return ""
    return "\n".join(clean_line(line) for line in data.splitlines())


def error_records(run_dir: Path, since_unix_s: float = 0.0) -> dict[int, ErrorRecord]:
    """What failed ranks wrote down since a moment: errors/rank-N.json, or error.json in a rank's own directory."""
    found: dict[int, ErrorRecord] = {}
    for path in [*run_dir.glob("errors/rank-*.json"), *run_dir.glob("ranks/*/error.json")]:
        try:
            told = json.loads(path.read_text())
            rank = int(told["rank"])
            text = str(told.get("traceback") or f"{told.get('type', 'error')}: {told.get('message', '')}")
            code, last = int(told.get("exit_code") or 1), _safe(told.get("at", ""))
            record = ErrorRecord(rank, float(told["time_unix_s"]), text.rstrip(), code, last)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a rank that was killed while it wrote
        if record.time_unix_s >= since_unix_s:
            found.setdefault(rank, record)
    return found


def hang_record(run_dir: Path, since_unix_s: float = 0.0) -> HangRecord | None:
    """What a rank wrote down since a moment when it found that nothing moves: errors/hang-ATTEMPT.json."""
    found = []
    for path in run_dir.glob("errors/hang-*.json"):
        try:
            told = json.loads(path.read_text())
            found.append(
                HangRecord(
                    time_unix_s=float(told["time_unix_s"]),
                    found_by=int(told["found_by"]),
                    line=str(told["line"]),
                    suspects=tuple(map(int, told["suspects"])),
                    ranks={int(rank): str(text) for rank, text in told["ranks"].items()},
                    stacks={int(rank): str(text) for rank, text in told["stacks"].items()},
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a rank that was killed while it wrote
    return next((each for each in found if each.time_unix_s >= since_unix_s), None)


def last_words(run_dir: Path, attempt: int) -> dict[int, str]:
    """Rank -> what it last said that it was at, of one attempt: ranks/N/progress.json."""
    found = {}
    for path in run_dir.glob("ranks/*/progress.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text())
            if told["life"] == str(attempt):
                found[int(path.parent.name)] = _safe(at_step(str(told["words"]), told["step"]))
    return found


def _safe(words: object) -> str:
    """What a rank wrote, as one short line."""
    return clean_line(str(words).replace("\n", " ").encode())[:_MOST_WORDS]


def newest_step(run_dir: Path, since_unix_s: float) -> int | None:
    """The newest step that ranks are known to have come to; None where nothing tells.

    Known are steps of metrics.jsonl, those that ranks are at (`ranks/N/progress.json`), and the checkpoints of the job:
    entries of `checkpoint.dir` whose names end in a number, such as step-00000100, changed since the run began.

    Args:
        run_dir: of the run; its job.json names the directory of checkpoints.
        since_unix_s: when the run began: older checkpoints are of other runs.
    """
    return max((*_logged(run_dir), *_told(run_dir), *_saved(run_dir, since_unix_s)), default=None)


def _logged(run_dir: Path) -> Iterator[int]:
    for line in log_end(run_dir / "metrics.jsonl").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            yield int(json.loads(line)["step"])


def _told(run_dir: Path) -> Iterator[int]:
    for path in run_dir.glob("ranks/*/progress.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield int(json.loads(path.read_text())["step"])


def _saved(run_dir: Path, since_unix_s: float) -> Iterator[int]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        for path in Path(json.loads((run_dir / "job.json").read_text())["checkpoint"]["dir"]).iterdir():
            found = None if path.name.startswith(".") else _NUMBERED.search(path.name)
            if found and path.stat().st_mtime >= since_unix_s:
                yield int(found[1])
