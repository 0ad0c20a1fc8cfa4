"""Trials that were run, one a line of a file: they add up, until they are too old for what is tried now."""

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.bench import Kind
from tests.lab.faults import FAULTS, Fault
from tests.lab.launches import ROOT
from tests.lab.reliability_page import read_trials

__all__ = ["drop", "still_due", "version"]

_TRIED = ("launch", "clusters", "parallel", "src", "tests/lab")


def version() -> str:
    """Commit of what is tried, with a + where files differ from it; empty outside of a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short=9", "HEAD") + ("+" if git("status", "--porcelain", "--", *_TRIED) else "")


def still_due(kind: Kind, repeat: int, *, only: str, results: Path) -> list[Fault]:
    """The trials that are left until there are so many of each fault, those with the fewest first.

    Args:
        kind: of cluster.
        repeat: trials of each fault.
        only: faults whose names contain these words.
        results: those that were run, one a line.
    """
    done = Counter(each["fault"] for each in read_trials(results) if each["kind"] == kind)
    chosen = [fault for fault in FAULTS if kind in fault.kinds and only in fault.name]
    return [fault for turn in range(repeat) for fault in chosen if done[fault.name] <= turn]


def drop(versions: Sequence[str], *, kinds: Sequence[Kind], only: str, results: Path) -> int:
    """Forgets trials of what is not tried any more; how many.

    Args:
        versions: of what was tried; empty words are trials that do not say.
        kinds: of cluster.
        only: of faults whose names contain these words.
        results: those that were run, one a line.
    """

    def old(trial: dict[str, Any]) -> bool:
        return trial.get("version", "") in versions and trial["kind"] in kinds and only in trial["fault"]

    trials = read_trials(results)
    kept = [each for each in trials if not old(each)]
    results.write_text("".join(f"{json.dumps(each)}\n" for each in kept))
    return len(trials) - len(kept)
