"""What a page shows of a run, read from its directory. A file that is missing, torn or strange shows less."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.launch.page.machines import Machines, read_machines
from meshwright.launch.page.values import finite, json_of, lines_of, listed, number

__all__ = ["Mark", "RunView", "points", "read_view"]

_AXES = ("pp", "dp", "fsdp", "cp", "tp", "ep")
_FAILURE_LINES = 30

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A restart: where the training went on, when, and why."""

    step: float
    time_unix_s: float | None
    text: str


@dataclass(frozen=True)
class RunView:
    """A run, as far as its directory tells.

    Args:
        name: of the job.
        run_id: of the run.
        state: succeeded, failed, interrupted, running, ... or unknown.
        facts: what stands below the name: mesh, cluster, number of ranks.
        steps: of the whole training; None where it is not known.
        started_unix_s: when it was launched, or the first record was written.
        ended_unix_s: when it ended, or the last record was written.
        records: of metrics.jsonl, in order.
        marks: restarts, in order.
        machines: what became of them, and what they did.
        reason: why it ended, in one line; empty where there is nothing to say.
        failure: the last lines of the first failing rank's traceback.
    """

    name: str
    run_id: str
    state: str
    facts: tuple[str, ...] = ()
    steps: float | None = None
    started_unix_s: float | None = None
    ended_unix_s: float | None = None
    records: tuple[Mapping[str, Any], ...] = ()
    marks: tuple[Mark, ...] = ()
    machines: Machines = field(default_factory=Machines)
    reason: str = ""
    failure: str = ""


def points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    """(step, value) of every record that has both.

    Args:
        records: of metrics.jsonl.
        key: dotted for a block, such as "experts.dead_experts".

    >>> points([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": "x"}], "loss")
    ((1.0, 2.0),)
    """
    found, parts = [], key.split(".")
    for record in records:
        value: object = record
        for part in parts:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and (amount := number(value)) is not None:
            step = finite(record.get("step"))
            if step is not None:
                found.append((step, amount))
    return tuple(found)


def read_view(run_dir: Path, state: str | None = None) -> RunView:
    """Reads a run directory.

    Args:
        run_dir: of the run; may hold nothing but metrics.jsonl.
        state: how the run stands, where there is no exit record.
    """
    job, ended, launch = (_json(run_dir / name) for name in ("job.json", "exit.json", "launch.json"))
    records, folder = tuple(lines_of(run_dir / "metrics.jsonl")), run_dir.resolve().name
    times = [each for record in records if (each := finite(record.get("time_unix_s"))) is not None]
    begun = [finite(each.get("started_unix_s")) for each in (launch, ended)]
    return RunView(
        name=str(_first(job.get("name"), launch.get("name"), folder)),
        run_id=str(_first(launch.get("run_id"), ended.get("run_id"), folder)),
        state=str(_first(ended.get("state"), state, "unknown")),
        facts=tuple(_facts(job, launch, _json(run_dir / "plan.json"))),
        steps=finite(_dict(job, "train").get("steps")),
        started_unix_s=_first(*begun, min(times, default=None)),
        ended_unix_s=_first(finite(ended.get("ended_unix_s")), max(times, default=None)),
        records=records,
        marks=tuple(_marks(records, ended)),
        machines=read_machines(run_dir, ended),
        reason=str(_first(ended.get("reason"), "")),
        failure=_end_of(_dict(ended, "first_failure").get("traceback")),
    )


def _first(*found: Any) -> Any:
    """The first that is something."""
    return next((each for each in found if each), None if found[-1] is None else found[-1])


def _end_of(text: object) -> str:
    return "\n".join(text.rstrip().splitlines()[-_FAILURE_LINES:]) if isinstance(text, str) else ""


def _json(path: Path) -> dict[str, Any]:
    found = json_of(path)
    return found if isinstance(found, dict) else {}


def _dict(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = found.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _facts(job: Mapping[str, Any], launch: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    if parallel := _dict(job, "parallel"):
        yield _mesh(parallel)
    nodes = plan.get("nodes")
    if isinstance(nodes, list) and nodes:
        yield f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    if cluster := launch.get("cluster"):
        yield f"on {cluster}"


def _mesh(parallel: Mapping[str, Any]) -> str:
    """The axes, and the order of a step where one is chosen.

    >>> _mesh({"dp": 2, "tp": 4, "schedule": "layered"})
    'dp=2 x tp=4, schedule layered'
    """
    degrees = {axis: number(parallel.get(axis)) or 1 for axis in _AXES}
    axes = " x ".join(f"{axis}={degree:.0f}" for axis, degree in degrees.items() if degree != 1) or "one rank"
    schedule = parallel.get("schedule")
    return axes if schedule in (None, "accumulate") else f"{axes}, schedule {schedule}"


def _marks(records: Sequence[Mapping[str, Any]], ended: Mapping[str, Any]) -> Iterator[Mark]:
    """Restarts by the exit record, with their causes; the others by what was written when the training went on."""
    known = {str(each.get("next_attempt")): each for each in listed(ended.get("restarts"))}
    written = [each for each in records if each.get("event") == "restart"]
    own = {str(each.get("attempt")): each for each in written if each.get("run_id") == ended.get("run_id")}
    found = [_of_launcher(each, own.get(attempt, {}), records) for attempt, each in known.items()]
    for each in written:
        attempt, is_own = str(each.get("attempt")), each.get("run_id") == ended.get("run_id")
        if not (is_own and attempt in known):
            text = (
                f"attempt {attempt}"
                if each.get("attempt")
                else f"launched again as {each.get('run_id') or 'another run'}"
            )
            found.append(Mark(finite(each.get("step")) or 0.0, finite(each.get("time_unix_s")), text))
    yield from sorted(found, key=lambda mark: (mark.time_unix_s or 0.0, mark.step))


def _of_launcher(told: Mapping[str, Any], own: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Mark:
    time_s, step = finite(told.get("time_unix_s")), finite(own.get("step"))
    text = f"attempt {told.get('next_attempt')}: {told.get('cause') or 'cause unknown'}{_regrouped(told)}"
    return Mark(_step_at(time_s, records) if step is None else step, time_s, text)


def _step_at(time_s: float | None, records: Sequence[Mapping[str, Any]]) -> float:
    """The last step that was logged before a moment."""
    logged = points(records, "time_unix_s")
    before = [(when, step) for step, when in logged if time_s is not None and when <= time_s]
    return max(before)[1] if before else 0.0


def _regrouped(told: Mapping[str, Any]) -> str:
    """What became of the nodes at a restart.

    >>> _regrouped({"nodes": [3, 2], "excludes": ["h2"]}), _regrouped({"nodes": None, "excludes": []})
    ('; on 2 nodes instead of 3, without h2', '')
    """
    parts, nodes, out = [], told.get("nodes"), told.get("excludes")
    if isinstance(nodes, list) and len(nodes) == 2:
        parts.append(f"on {nodes[1]} nodes instead of {nodes[0]}")
    if isinstance(out, list) and out:
        parts.append(f"without {', '.join(map(str, out))}")
    return f"; {', '.join(parts)}" if parts else ""
