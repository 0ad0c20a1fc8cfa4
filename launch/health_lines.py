"""What agents saw of their machines: one line of health.jsonl each, and one for people."""

import json
from collections.abc import Callable
from pathlib import Path

from meshwright.launch.rundir import HEALTH_FILE
from meshwright.launch.supervise import RunState

__all__ = ["HealthLines"]


class HealthLines:
    """Writes and says what is new.

    Args:
        run_dir: of the run.
        mask: replaces secrets.
        write: takes one line for people.
    """

    def __init__(self, run_dir: Path, mask: Callable[[str], str], write: Callable[[str], object]) -> None:
        self._path, self._mask, self._write = run_dir / HEALTH_FILE, mask, write
        self._done = 0
        self._said: set[tuple[str, str]] = set()

    def __call__(self, state: RunState) -> None:
        """Takes what came since the last call."""
        new = state.health[self._done :]
        self._done = len(state.health)
        for each in new:
            if (each["node"], each["found"]) in self._said:  # agents that were started again see it again
                continue
            self._said.add((each["node"], each["found"]))
            found = self._mask(each["found"])
            if each["fault"] is not None:
                kept = {"node": each["node"], "fault": found, "time_unix_s": each["time_unix_s"]}
                with self._path.open("a") as file:
                    file.write(json.dumps(kept) + "\n")
            self._write(f"meshwright: health of {each['node']}: {found}")
