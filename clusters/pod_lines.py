"""What a pod prints: lines of its ranks as they come, and records of what happened, for whoever fetches them."""

import base64
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from meshwright.clusters.masking import Mask
from meshwright.clusters.node_counters import FOLDER, thinned
from meshwright.clusters.records import clean_line
from meshwright.clusters.sending import OF_RANK

__all__ = ["Printer", "last_lines", "left_of", "missing_of"]

_RECORD = re.compile(r"errors/[^/]+\.json|ranks/[0-9]+/error\.json|nodes/[^/]+\.jsonl")
_ATTEMPT = re.compile(r"\.attempt-([0-9]+)\.log")
_MOST_COUNTED = 100
_MOST_LEFT = 8192
"""Characters; kubelets cut longer lines of a log in two, and put them together again."""

_LAST_BYTES = 1 << 16  # more than a pod says again
Event = Mapping[str, Any]


class Printer:
    """Prints what grows in the logs of ranks, a line at a time, each with its host and rank, without secrets.

    Args:
        host: of this pod.
        ranks: of this pod; on a volume that pods share, logs of others lie beside theirs.
        mask: takes secrets out.
        printed: names of files that pods of an earlier start have printed.
    """

    def __init__(self, host: str, ranks: Collection[int], mask: Mask, *, printed: Collection[str] = ()) -> None:
        self._host, self._ranks, self._mask, self._printed = host, ranks, mask, printed
        self._counted = f"{FOLDER}/{host}.jsonl"
        self._rest: dict[str, bytes] = {}
        self.records: dict[str, str] = {}

    def __call__(self, event: str, **part: Any) -> None:
        """Takes what was written to a file; error records are kept until the end."""
        name, data = str(part["path"]), base64.b64decode(part["data"])
        found = OF_RANK.match(name)
        if name in self._printed or (found and int(found[1]) not in self._ranks):
            return
        if name.startswith("logs/rank-"):
            *lines, self._rest[name] = (self._rest.get(name, b"") + data).split(b"\n")
            self._print(name, lines)
        elif _RECORD.fullmatch(name) and (name == self._counted or not name.startswith(FOLDER)):
            self.records[name] = (self.records[name] if part["at"] else "") + data.decode(errors="replace")

    def _print(self, name: str, lines: list[bytes]) -> None:
        rank = name.split("-")[1].partition(".")[0]
        sys.stdout.write("".join(f"{self._host}:{rank} {self._mask(clean_line(line))}\n" for line in lines))
        sys.stdout.flush()

    def begin(self, events: Sequence[Event], left: Mapping[int, Sequence[str]]) -> None:
        """Prints what earlier pods left, since what they printed went with them, maybe before anybody had fetched it.

        Args:
            events: of theirs, as a record without an end: this pod may not come to its own.
            left: rank -> its last lines.
        """
        for rank, lines in left.items():
            self._record({"node": self._host, "rank": rank, "left": lines})
        self._record({"node": self._host, "events": events, "files": {}})

    def tell_pods(self, pods: Sequence[int]) -> None:
        """Prints which pods have ranks, by their indices in the order of their nodes."""
        self._record({"node": self._host, "pods": list(pods)})

    def finish(self, code: int, events: Sequence[Event]) -> None:
        """Prints lines that were not ended, and the record by which who looks from outside tells what happened."""
        for name, line in self._rest.items():
            self._print(name, [line] if line else [])
        files = {}
        for name, text in self.records.items():
            with suppress(ValueError):  # a rank that was killed while it wrote
                files[name] = _few(text) if name.endswith(".jsonl") else json.loads(text)
        self._record({"node": self._host, "exit_code": code, "events": events, "files": files})

    def _record(self, told: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps({"meshwright": self._mask.inside(told)}) + "\n")
        sys.stdout.flush()


def _few(text: str) -> list[Mapping[str, Any]]:
    """Counters of a node, as few as fit into a line of a log."""
    records: list[Mapping[str, Any]] = [json.loads(line) for line in text.splitlines()]
    while len(records) > _MOST_COUNTED:
        records = thinned(records)
    return records


def last_lines(path: Path) -> list[str]:
    """The last whole lines of a log, clean, as they are printed; none where there is no log."""
    try:
        with path.open("rb") as file:
            at = max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES)
            file.seek(at)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    ended = lines[:-1] if not lines[-1] else lines
    return [clean_line(line) for line in (ended[1:] if at else ended)]


def left_of(run_dir: Path, ranks: Iterable[int]) -> dict[int, list[str]]:
    """The last lines of ranks on a volume that earlier pods shared, over all of their attempts.

    Args:
        run_dir: of the run, in the pods.
        ranks: whose.
    """
    found = {}
    for rank in ranks:
        logs = sorted(run_dir.glob(f"logs/rank-{rank}.*log"), key=_attempt_of)
        lines = [line for path in logs for line in last_lines(path)]
        sizes = accumulate(len(line) + 1 for line in reversed(lines))
        kept = sum(size <= _MOST_LEFT for size in sizes)
        if kept:
            found[rank] = lines[-kept:]
    return found


def _attempt_of(path: Path) -> int:
    found = _ATTEMPT.search(path.name)
    return int(found[1]) if found else 0


def missing_of(known: Sequence[str], left: Sequence[str]) -> list[str]:
    """Lines that are not known, of those that somebody left.

    Args:
        known: the last lines that are known, in the order in which they were fetched.
        left: the last lines that were written, in the order in which they were.

    >>> missing_of(["a", "b", "c"], ["b", "c", "d"]), missing_of(["a"], ["c"]), missing_of(["a", "b"], ["b"])
    (['d'], ['c'], [])
    """
    sizes = range(min(len(known), len(left)), 0, -1)
    overlap = next((size for size in sizes if list(known[-size:]) == list(left[:size])), 0)
    if overlap:
        return list(left[overlap:])
    seen = list(known[-len(left) :]) if left else []  # in another order, as logs of attempts are fetched
    missing = []
    for line in left:
        if line in seen:
            seen.remove(line)
        else:
            missing.append(line)
    return missing
