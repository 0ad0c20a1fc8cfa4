"""A run's machines, from what its directory tells: left out, taken back, at fault, and what they did meanwhile."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.clusters.node_counters import FOLDER
from meshwright.launch.page.values import finite, json_of, lines_of, listed
from meshwright.launch.rundir import EXCLUDED_FILE, HEALTH_FILE

__all__ = ["Counted", "MachineEvent", "Machines", "machine_events", "read_machines"]

Counted = Mapping[str, Sequence[Mapping[str, Any]]]
"""Node -> its counters, by time."""


@dataclass(frozen=True)
class MachineEvent:
    """Something that befell one machine.

    Args:
        node: its name.
        time_unix_s: when; None where nobody wrote it down.
        text: what.
    """

    node: str
    time_unix_s: float | None
    text: str


@dataclass(frozen=True)
class Machines:
    """All machines of a run.

    Args:
        events: what became of them, by time.
        counted: what they did.
    """

    events: tuple[MachineEvent, ...] = ()
    counted: Counted = field(default_factory=dict)


def read_machines(run_dir: Path, ended: Mapping[str, Any]) -> Machines:
    """Reads a run directory.

    Args:
        run_dir: of the run.
        ended: the exit record; empty while the run is not over.
    """
    files = sorted((run_dir / FOLDER).glob("*.jsonl"))
    return Machines(machine_events(run_dir, ended), {path.stem: tuple(lines_of(path)) for path in files})


def machine_events(run_dir: Path, ended: Mapping[str, Any]) -> tuple[MachineEvent, ...]:
    """Events of all machines, by time.

    Args:
        run_dir: of the run; while it runs, two files there tell what the exit record will.
        ended: the exit record; empty while the run is not over.
    """
    faults = listed(ended.get("health")) if ended else lines_of(run_dir / HEALTH_FILE)
    excluded = listed(ended.get("excluded") if ended else json_of(run_dir / EXCLUDED_FILE))
    found = [MachineEvent(_node(each), finite(each.get("time_unix_s")), str(each.get("fault"))) for each in faults]
    found += [event for each in excluded for event in _of_excluded(each)]
    return tuple(sorted(found, key=lambda event: (event.time_unix_s or 0.0, event.node)))


def _node(told: Mapping[str, Any]) -> str:
    return str(told.get("node", "?"))


def _of_excluded(told: Mapping[str, Any]) -> Iterator[MachineEvent]:
    node, step = _node(told), finite(told.get("step"))
    where = "" if step is None else f" at step {step:,.0f}"
    why = told.get("why") or "nobody said why"
    yield MachineEvent(node, finite(told.get("time_unix_s")), f"left out{where}: {why}")
    if "back_unix_s" in told:
        yield MachineEvent(node, finite(told["back_unix_s"]), "there again, and taken back")
