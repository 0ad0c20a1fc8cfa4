"""The page of reliability, made of the trials that were run."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tests.lab.faults import ABSENT, FAULTS
from tests.lab.launches import ROOT

__all__ = ["PAGE", "RESULTS", "is_good", "page", "read_trials"]

RESULTS = ROOT / "benchmarks/results/reliability.jsonl"
PAGE = ROOT / "docs/reliability.md"

_HEAD = """\
# What faults do to a training

<!-- Made by `python -m tests.lab.reliability --write` from benchmarks/results/reliability.jsonl; do not edit. -->

Each row is a fault that was made to happen to a small training on two hosts, with a third one to spare, at a random
moment after its first checkpoint. The hosts are pretended: each has its own network, processes and sshd, on one machine
with two cores, which runs several trials at once; Slurm is real. Seconds are from the blow to the line of the launcher
that names who and why.

- **good**: trials in which all of the following was as it must be, of all trials.
- **named**: trials in which that line came, of all trials.
- **median, slowest**: of those seconds; a refusal counts from the command, a hang from its beginning.
- **lost**: most steps that were done again though a whole checkpoint had them.
- **left**: most processes that were still there ten seconds after the end and the mending: ranks, agents, launchers,
  and whatever else hosts had not run before.
- **load**: processes that would have run at the end of a trial, at most; beyond two, everything takes longer.
- **same**: trials whose every loss is, bit for bit, that of an undisturbed run; refused launches start nothing.

**Does not hold:** Slurm itself takes a node for lost, and queues its job again, only after `SlurmdTimeout` (30 s here,
5 minutes by default). That the first node of a job is gone, with the launcher on it, is said by a `meshwright launch`
or `attach` that looks at the run; without one the job also waits for the two minutes for which Slurm holds what it
queued again. A first node that is only cut off keeps one process of the run, without ranks, until it is reached again,
and Slurm's own slurmstepd of the step, which is not counted, for up to a minute more, as it tells Slurm only then.

`make faults` runs every trial that is missing until there are 20 of each.

"""


def read_trials(results: Path) -> list[dict[str, Any]]:
    """All trials of a file, of faults that there still are."""
    tried = {(fault.name, kind) for fault in FAULTS for kind in fault.kinds}
    lines = results.read_text().splitlines() if results.exists() else []
    return [each for each in map(json.loads, lines) if (each["fault"], each["kind"]) in tried]


def page(results: Path) -> str:
    """The page as text."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in read_trials(results):
        groups.setdefault((each["fault"], each["kind"]), []).append(each)
    lines = [
        "| fault | cluster | good | named | median s | slowest s | limit s | lost | left | same | load |",
        "|---" * 11 + "|",
    ]
    rows = {key: _row(*key, found) for key, found in groups.items()}
    rows |= {key: f"| {' | '.join(key)} | {' | '.join(['-'] * 9)} |" for key in ABSENT}
    lines += [row for _, row in sorted(rows.items())]
    versions = Counter(each.get("version") or "an earlier one" for found in groups.values() for each in found)
    tried = ", ".join(f"{version} ({number})" for version, number in versions.items())
    absent = [f"- {fault}, on {kind}: {why}." for (fault, kind), why in sorted(ABSENT.items())]
    lines += ["", f"Trials by the commit that was tried: {tried}.", ""]
    return _HEAD + "\n".join([*lines, "Rows without numbers are faults that a cluster cannot have:", "", *absent, ""])


def is_good(trial: Mapping[str, Any]) -> bool:
    """Whether all was as it must be in a trial."""
    in_time = trial["detected_s"] is None or trial["detected_s"] <= trial["limit_s"]
    wrong = trial["lost_steps"] or trial["left"] or trial["note"]
    return bool(trial["named"] and trial["same"] and in_time and not wrong)


def _row(fault: str, kind: str, trials: list[Mapping[str, Any]]) -> str:
    loads = [each["load"] for each in trials if each.get("load") is not None]
    times_s = [each["detected_s"] for each in trials if each["detected_s"] is not None]
    cells = [
        fault,
        kind,
        f"{sum(map(is_good, trials))} of {len(trials)}",
        f"{sum(each['named'] for each in trials)} of {len(trials)}",
        f"{median(times_s):.1f}" if times_s else "-",
        f"{max(times_s):.1f}" if times_s else "-",
        f"{trials[-1]['limit_s']:g}",
        str(max(each["lost_steps"] for each in trials)),
        str(max(each["left"] for each in trials)),
        f"{sum(each['same'] for each in trials)} of {len(trials)}",
        f"{max(loads):.0f}" if loads else "-",
    ]
    return f"| {' | '.join(cells)} |"
