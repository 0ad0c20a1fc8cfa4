"""The merged stream: lines of all ranks as they come, in merged.log and, of chosen ranks, on the terminal."""

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from meshwright.clusters.base import StartPlan, log_name
from meshwright.clusters.descriptors import make_room
from meshwright.clusters.masking import Mask
from meshwright.clusters.records import clean_line
from meshwright.launch.logs import LogTail
from meshwright.launch.supervise import RunState
from meshwright.launch.values import fill

__all__ = ["MergedStream", "Shown"]


@dataclass(frozen=True)
class Shown:
    """What of the ranks' output is shown.

    Args:
        ranks: whose lines.
        prefix: template of a line's start.
        keep_attempts: attempts whose logs are kept.
        mask: replaces secrets.
        write: takes one line for people.
    """

    ranks: Collection[int]
    prefix: str
    keep_attempts: int
    mask: Mask
    write: Callable[[str], None]


class MergedStream:
    """Follows the logs of all ranks of the newest attempt.

    Args:
        run_dir: where they lie.
        shown: what goes to the terminal.
    """

    def __init__(self, run_dir: Path, shown: Shown) -> None:
        self._run_dir, self._shown = run_dir, shown
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._merged = os.fdopen(os.open(self._run_dir / "merged.log", flags, 0o600), "w", encoding="utf-8")
        self._attempt = -1
        self._tails: list[LogTail] = []

    def __call__(self, state: RunState) -> None:
        """Hands on what has been written since the last call."""
        if state.attempt != self._attempt:
            self._follow(state.plan, state.attempt)
        for tail in self._tails:
            tail.read()
        self._merged.flush()

    def _follow(self, plan: StartPlan, attempt: int) -> None:
        for tail in self._tails:
            tail.close()
        self._attempt = attempt
        kept = make_room(plan.world_size)  # others are opened for every look
        self._tails = [
            LogTail(self._run_dir / log_name(rank, attempt), partial(self._line, host, rank), keep=index < kept)
            for index, (host, rank) in enumerate((node.name, rank) for node in plan.nodes for rank in node.ranks)
        ]
        old = attempt - self._shown.keep_attempts
        for rank in range(plan.world_size) if old >= 0 else ():
            (self._run_dir / log_name(rank, old)).unlink(missing_ok=True)

    def _line(self, host: str, rank: int, raw: bytes) -> None:
        prefix = fill(self._shown.prefix, host=host, rank=str(rank))
        line = f"{prefix} | {self._shown.mask(clean_line(raw))}"
        self._merged.write(f"{line}\n")
        if rank in self._shown.ranks:
            self._shown.write(line)

    def close(self) -> None:
        """Hands on the rest; a disk that is full by now has been complained about."""
        with suppress(OSError):
            for tail in self._tails:
                tail.close()
        self._tails = []
        with suppress(OSError):
            self._merged.close()
