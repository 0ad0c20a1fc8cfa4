"""What a run in pods had behind it when its JobSet started them again: on their claim, or else only how often."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.clusters.failure import Failure
from meshwright.clusters.retry import Decision, told_decision

__all__ = ["Journal"]

_ANEW, _WENT = "the JobSet started its pods again", "a pod was killed, evicted, or went with its node"


class Journal:
    """Events of the agents of a run's pods over all starts of them; each pod writes a file of its own.

    Args:
        run_dir: of the run, in the pods.
        node: index of this pod.
        times: how often the JobSet has started its pods again.
    """

    def __init__(self, run_dir: Path, node: int, times: int) -> None:
        self._folder, self._node, self._times = run_dir / "private", node, times

    def keep(self, event: Mapping[str, Any]) -> None:
        """Writes an event down, for the pods of a later start."""
        with suppress(OSError), self._path(self._node).open("a") as file:
            file.write("\n" + json.dumps({"times": self._times, "told": event}) + "\n")  # ends one that is torn

    def _path(self, node: int | str) -> Path:
        return self._folder / f"events-{node}.jsonl"

    def _read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Events of earlier starts: pods of this one may be writing already."""
        with suppress(OSError):
            for line in path.read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # of a pod that was killed while it wrote
                    found = json.loads(line)
                    if found["times"] < self._times:
                        yield found["told"]

    def past(self) -> tuple[Decision, ...]:
        """What followed from every attempt before, alike in all pods."""
        events = [event for path in sorted(self._folder.glob("events-*.jsonl")) for event in self._read(path)]
        told = sorted(
            (event for event in events if event["event"] == "decided"), key=lambda event: bool(event["again"])
        )
        decided = {event["attempt"]: replace(told_decision(event), again=True) for event in told}
        number = max((event["attempt"] + 1 for event in events if event["event"] == "started"), default=0)
        return tuple(
            decided.get(attempt) or Decision(True, _ANEW, 0.0, attempt, Failure("", "node", 69, evidence=_WENT))
            for attempt in range(max(number, self._times))
        )

    def told(self, past: Sequence[Decision]) -> list[dict[str, Any]]:
        """This pod's events of earlier starts, with what followed from every attempt of these."""
        known = [event for event in self._read(self._path(self._node)) if event["event"] != "decided"]
        return [*known, *({"told_unix_s": 0.0, "event": "decided", **each.as_dict()} for each in past)]
