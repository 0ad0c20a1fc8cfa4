"""Makes every fault of the table happen, again and again, and writes what was seen to docs/reliability.md.

`python -m tests.lab.reliability [--repeat N] [--kind ssh|slurm] [--only WORDS] [--labs N] [--results FILE] [--write]`,
as root. Each trial is added to benchmarks/results/reliability.jsonl, or to another file, as it ends, until there are N
of every fault: what was stopped goes on where it was. `--write` writes the page at the end, also of what was stopped;
alone it does nothing else. Most of a trial is waiting, so several labs, each with hosts of its own, run trials at once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from tests.lab.bench import STEPS, Bench, Kind, write_faulted
from tests.lab.faults import AGAIN, FAULTS, LOOK, REFUSED, UNHARMED, Fault
from tests.lab.hosts import Hosts, missing_for_hosts, run
from tests.lab.reliability_page import PAGE, RESULTS, is_good, page
from tests.lab.slurm import Slurm, missing_for_slurm
from tests.launch.waiting import eventually

__all__ = ["Trial", "attempt", "lab", "main", "still_due", "undisturbed"]

_SMALL_BYTES = 256 << 20


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

    @property
    def good(self) -> bool:
        """Whether all was as it must be."""
        return is_good(asdict(self))


@contextmanager
def lab(kind: Kind, number: int = 0) -> Iterator[tuple[Path, Hosts, Slurm | None]]:
    """Three hosts, and Slurm on them where it is asked for, around a folder that all of them see.

    Args:
        kind: of cluster.
        number: tells labs of this process apart.
    """
    folder = Path(tempfile.mkdtemp(prefix="meshwright-faults-"))
    folder.chmod(0o755)
    (folder / "small").mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={_SMALL_BYTES}", "tmpfs", str(folder / "small"))
    hosts = Hosts(folder, number=3, token=os.getpid() + 101 * number)
    slurm = Slurm(hosts) if kind == "slurm" else None
    try:
        hosts.up()
        hosts.wait()
        if slurm is not None:
            slurm.up()
        yield folder, hosts, slurm
    finally:
        if slurm is not None:
            slurm.down()
        hosts.down()
        run("umount", "-l", str(folder / "small"), check=False)
        shutil.rmtree(folder, ignore_errors=True)


def undisturbed(kind: Kind, folder: Path, hosts: Hosts, slurm: Slurm | None) -> dict[int, float]:
    """Losses of a run that nothing befalls."""
    bench = Bench(kind, folder / f"f{os.getpid()}-undisturbed", hosts, slurm, variables={}, cluster={})
    try:
        bench.start(write_faulted(bench.folder))
        code = bench.end()
        if code != 0 or len(bench.losses()) != STEPS:
            raise RuntimeError(f"the undisturbed run ended with {code}: {bench.said('(?s).*')}")
        return bench.losses()
    finally:
        bench.close()


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
    return Trial(
        fault=fault.name,
        kind=bench.kind,
        detected_s=None if detected_s is None else round(detected_s, 2),
        named=not fault.culprit or detected_s is not None,
        limit_s=fault.limit_s,
        lost_steps=_lost(bench, saved),
        left=len(left),
        same=done,
        code=code,
        wall_s=round(time.monotonic() - began_s, 1),
        note="; ".join(notes),
        load=round(os.getloadavg()[0], 1),
    )


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


def _lost(bench: Bench, saved: list[int]) -> int:
    """Steps of whole checkpoints that were not gone on from."""
    steps = [int(each) for each in bench.all_said(r"resumed from .* at step (\d+)")]
    return max(0, saved[-1] - min(steps)) if saved and steps else 0


def main(words: list[str] | None = None) -> int:
    """Runs trials, or writes the page; the exit code tells whether all were as they must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=0, help="trials of each fault that there are to be in the end")
    parser.add_argument("--kind", choices=("ssh", "slurm"), action="append")
    parser.add_argument("--only", default="", help="faults whose names contain these words")
    parser.add_argument("--labs", type=int, default=3, help="trials that run at once")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where trials are kept")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    asked = parser.parse_args(words)
    lacking = missing_for_hosts() or (missing_for_slurm() if asked.kind != ["ssh"] else "")
    if asked.repeat and lacking:
        sys.stderr.write(f"no trial is run: {lacking}\n")
        return 69
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    try:
        bad = sum(_trials(kind, asked) for kind in asked.kind or ("ssh", "slurm"))
    finally:
        if asked.write:
            PAGE.write_text(page(asked.results))
    return int(bad > 0)


def still_due(kind: Kind, repeat: int, *, only: str = "", results: Path = RESULTS) -> list[Fault]:
    """The trials that are left until there are so many of each fault, in turn.

    Args:
        kind: of cluster.
        repeat: trials of each fault.
        only: faults whose names contain these words.
        results: those that were run, one a line.
    """
    lines = results.read_text().splitlines() if results.exists() else []
    done = Counter(each["fault"] for each in map(json.loads, lines) if each["kind"] == kind)
    chosen = [fault for fault in FAULTS if kind in fault.kinds and only in fault.name]
    return [fault for turn in range(repeat) for fault in chosen if done[fault.name] <= turn]


def _trials(kind: Kind, asked: argparse.Namespace) -> int:
    """Runs what is left of all faults of a kind of cluster; how many trials were not as they must be."""
    due = still_due(kind, asked.repeat, only=asked.only, results=asked.results)
    work = _Work(kind, deque(enumerate(due)), asked.seed, asked.results)
    with ThreadPoolExecutor(max(1, asked.labs)) as pool:
        try:
            return sum(pool.map(work.run, range(min(asked.labs, len(due)))))
        finally:
            work.due.clear()  # whoever is told to end lets trials that run come to their end


@dataclass
class _Work:
    """Trials that labs take one after the other.

    Args:
        kind: of cluster.
        due: numbered.
        seed: of the moments at which faults strike.
        results: where trials are kept.
    """

    kind: Kind
    due: deque[tuple[int, Fault]]
    seed: int
    results: Path

    def __post_init__(self) -> None:
        self._lock, self._expected = Lock(), dict[int, float]()

    def run(self, number: int) -> int:
        """Runs trials in one lab as long as there are some; how many were not as they must be."""
        bad = 0
        with lab(self.kind, number) as (folder, hosts, slurm):
            with self._lock:
                self._expected = self._expected or undisturbed(self.kind, folder, hosts, slurm)
            while self.due:
                index, fault = self.due.popleft()
                where = folder / f"f{os.getpid()}-{index:03}-{fault.name.replace(' ', '-')}"
                bench = Bench(self.kind, where, hosts, slurm, variables=fault.variables, cluster=fault.cluster)
                try:
                    trial = attempt(fault, bench, self._expected, random.Random(f"{self.seed}-{index}"))
                finally:
                    fault.mend(bench)
                    bench.restore()
                    bench.close()
                bad += not trial.good
                with self._lock:
                    _keep(trial, where, self.results)
                if slurm is not None:
                    slurm.mend()
        return bad


def _keep(trial: Trial, where: Path, results: Path) -> None:
    """Writes a trial down, and keeps the files of one that was not as it must be."""
    with results.open("a") as file:
        file.write(json.dumps({**asdict(trial), "time_unix_s": int(time.time())}) + "\n")
    sys.stdout.write(f"{'good' if trial.good else 'BAD '} {trial}\n")
    sys.stdout.flush()
    if not trial.good:
        shutil.copytree(where, Path(tempfile.gettempdir()) / "meshwright-bad" / where.name, dirs_exist_ok=True)
    shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
