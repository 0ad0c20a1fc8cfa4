"""One live progress bar on a terminal, fed by the metrics that rank 0 writes; elsewhere nothing."""

import json
from pathlib import Path
from typing import Any

from meshwright.launch.logs import LogTail
from meshwright.launch.supervise import RunState

__all__ = ["ProgressBar"]


class ProgressBar:
    """Draws the newest record of metrics.jsonl below the stream of lines.

    Args:
        metrics: the file, which need not exist yet.
        steps: steps of the whole training.
    """

    def __init__(self, metrics: Path, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), transient=True, refresh_per_second=4)
        self._task = self._progress.add_task("", total=steps)
        self._tail = LogTail(metrics, self._record)
        self._progress.start()

    def __call__(self, state: RunState) -> None:
        """Reads what is new."""
        self._tail.read()

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _record(self, raw: bytes) -> None:
        try:
            record: dict[str, Any] = json.loads(raw)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            return
        parts = [f"loss {record['loss']:.3f}"] if "loss" in record else []
        if "tokens_per_s" in record:
            parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        self._progress.update(self._task, completed=step, description="  ".join(parts) or None)

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()
