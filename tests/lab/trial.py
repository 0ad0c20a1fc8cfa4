"""One fault, made to happen once: what was seen of it, and whether that was as it must be."""

import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.bench import Bench, write_faulted
from tests.lab.faults import AGAIN, GOES_ON, LOOK, REFUSED, UNHARMED, Fault
from tests.lab.reliability_page import is_good
from tests.launch.waiting import eventually

__all__ = ["Trial", "attempt", "broken", "lost_steps"]

_SAID_CHARS = 160


@dataclass(frozen=True)
class Trial:
    """What was seen of one fault.

    Args:
        fault: its name.
        kind: of cluster.
        detected_s: from the blow to the words that name who and why; None where there was nothing to say, or none came.
        named: whether they were said, or need not be.
        limit_s: in which they must be.
        lost_steps: steps between the newest whole checkpoint and the one that was resumed from.
        left: processes that were still there after the end.
        same: whether the losses of all steps are, bit for bit, those of an undisturbed run, or nothing was started.
        code: of the last launch.
        wall_s: of the whole trial.
        note: what was wrong, in words.
        load: of the machine at the end, in processes that would run: its two cores have other work too.
        said: the line of those words.
        resumed: the earliest step that was resumed from; None where nothing was.
        version: commit of what was tried; with a + where files differed from it.
    """

    fault: str
    kind: str
    detected_s: float | None
    named: bool
    limit_s: float
    lost_steps: int
    left: int
    same: bool
    code: int | None
    wall_s: float
    note: str = ""
    load: float | None = None
    said: str = ""
    resumed: int | None = None
    version: str = ""

    @property
    def good(self) -> bool:
        """Whether all was as it must be."""
        return is_good(asdict(self))


def attempt(fault: Fault, bench: Bench, expected: dict[int, float], generator: random.Random) -> Trial:
    """Makes the fault happen once to a bench that has not started yet."""
    began_s = time.monotonic()
    job = write_faulted(bench.folder, **fault.keys)
    if fault.follows == REFUSED:
        fault.strike(bench)
    bench.start(job)
    struck_s, saved, notes = began_s, list[int](), list[str]()
    if fault.follows not in (REFUSED, UNHARMED):
        checkpoints = bench.folder / fault.keys.get("checkpoint", {}).get("dir", "checkpoints")
        if not bench.trains(checkpoints, generator, saved=fault.saved):
            notes.append("it did not come to a checkpoint")
        struck_s = time.monotonic()
        before = bench.saved(checkpoints)
        fault.strike(bench)
        saved = [step for step in before if step != bench.spoiled]
    detected_s = _heard(fault, bench, struck_s)
    code = _followed(fault, bench, job, notes)
    done = code not in (0, None) if fault.follows == REFUSED else code == 0 and bench.losses() == expected
    bench.restore()
    left = bench.left()
    notes += left
    resumed = [int(each) for each in bench.all_said(r"resumed from .* at step (\d+)")]
    return Trial(
        fault=fault.name,
        kind=bench.kind,
        detected_s=None if detected_s is None else round(detected_s, 2),
        named=not fault.culprit or detected_s is not None,
        limit_s=fault.limit_s,
        lost_steps=lost_steps(saved, resumed, again=fault.follows in (GOES_ON, AGAIN)),
        left=len(left),
        same=done,
        code=code,
        wall_s=round(time.monotonic() - began_s, 1),
        note="; ".join(notes),
        load=round(os.getloadavg()[0], 1),
        said=_words(fault, bench),
        resumed=min(resumed, default=None),
    )


def broken(fault: Fault, bench: Bench, error: BaseException) -> Trial:
    """A trial that did not come to its end: it counts, and not as good."""
    return Trial(
        fault=fault.name,
        kind=bench.kind,
        detected_s=None,
        named=False,
        limit_s=fault.limit_s,
        lost_steps=0,
        left=0,
        same=False,
        code=None,
        wall_s=0.0,
        note=f"the trial broke off: {type(error).__name__}: {error}"[: 2 * _SAID_CHARS],
        load=round(os.getloadavg()[0], 1),
    )


def _words(fault: Fault, bench: Bench) -> str:
    """The line that named who and why; what lies in the lab's folder, wherever that is."""
    said = bench.said(f".*(?:{fault.culprit}).*") if fault.culprit else ""
    return said.replace(f"{bench.folder}/", "").replace(str(bench.folder.parent), "..")[:_SAID_CHARS]


def _heard(fault: Fault, bench: Bench, struck_s: float) -> float | None:
    """Seconds until the launcher named who and why."""
    if not fault.culprit:
        return None
    eventually(lambda: bool(bench.said(fault.culprit)) or bench.over(), 60)
    return time.monotonic() - struck_s if bench.said(fault.culprit) else None


def _followed(fault: Fault, bench: Bench, job: Path, notes: list[str]) -> int | None:
    """Sees the training to its end; the exit code of the last launch."""
    if fault.follows in (AGAIN, LOOK):
        bench.end()
        if fault.follows == LOOK:
            return bench.attach()
        if left := bench.left():
            notes.append(f"lived on: {', '.join(left)}")
        fault.mend(bench)
        bench.start(job)
        return bench.end()
    fault.mend(bench)
    return bench.end()


def lost_steps(saved: list[int], resumed: list[int], *, again: bool) -> int:
    """Steps of whole checkpoints that were not gone on from.

    Args:
        saved: steps of whole checkpoints when it happened, ascending.
        resumed: steps that were resumed from.
        again: whether ranks had to be started again; those that resumed from nothing began with the first step.

    >>> lost_steps([6, 12], [12], again=True), lost_steps([6, 12], [], again=True), lost_steps([6], [], again=False)
    (0, 12, 0)
    """
    if not saved or not (resumed or again):
        return 0
    return max(0, saved[-1] - min(resumed, default=0))
