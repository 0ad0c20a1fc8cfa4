"""Makes every fault of the table happen, again and again, and writes what was seen to docs/reliability.md.

`python -m tests.lab.reliability [--repeat N] [--kind ssh|slurm] [--only WORDS] [--labs N] [--drop VERSION]
[--results FILE] [--write]`, as root. Each trial is added to benchmarks/results/reliability.jsonl, or to another file,
as it ends, until there are N of every fault: what was stopped goes on where it was, and nothing of it stays (see
`sealed`). `--drop` first forgets those of an earlier version of what is tried. `--write` writes the page at the end,
also of what was stopped; alone it does nothing else. Most of a trial is waiting, so several labs, each with hosts of
its own, run trials at once, of both kinds.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

from tests.lab.bench import SMALL, STEPS, Bench, Kind, write_faulted
from tests.lab.faults import BOTH, Fault
from tests.lab.hosts import Hosts, missing_for_hosts, run
from tests.lab.kept import drop, still_due, version
from tests.lab.reliability_page import PAGE, RESULTS, page
from tests.lab.sealed import SEAL, make_folder, sealed
from tests.lab.slurm import Slurm, missing_for_slurm
from tests.lab.trial import Trial, attempt, broken

__all__ = ["lab", "main", "undisturbed"]

_SMALL_BYTES = 256 << 20
_MOST_LABS = 20
_BREAKS = 3
_BROKEN = (RuntimeError, OSError, AssertionError, subprocess.SubprocessError)


@contextmanager
def lab(kind: Kind, number: int = 0) -> Iterator[tuple[Path, Hosts, Slurm | None]]:
    """Three hosts, and Slurm on them where it is asked for, around a folder that all of them see.

    Args:
        kind: of cluster.
        number: tells labs of this process apart.
    """
    folder = make_folder()
    (folder / SMALL).mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={_SMALL_BYTES}", "tmpfs", str(folder / SMALL))
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
        run("umount", "-l", str(folder / SMALL), check=False)
        shutil.rmtree(folder, ignore_errors=True)


def undisturbed(kind: Kind, folder: Path, hosts: Hosts, slurm: Slurm | None) -> dict[int, float]:
    """Losses of a run that nothing befalls."""
    bench = Bench(kind, folder / f"f{os.getpid()}-{kind}-undisturbed", hosts, slurm, variables={}, cluster={})
    try:
        bench.start(write_faulted(bench.folder))
        code = bench.end()
        if code != 0 or len(bench.losses()) != STEPS:
            raise RuntimeError(f"the undisturbed run ended with {code}: {bench.said('(?s).*')}")
        return bench.losses()
    finally:
        bench.close()


def main(words: list[str] | None = None) -> int:
    """Runs trials, or writes the page; the exit code tells whether all were as they must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=0, help="trials of each fault that there are to be in the end")
    parser.add_argument("--kind", choices=BOTH, action="append")
    parser.add_argument("--only", default="", help="faults whose names contain these words")
    parser.add_argument("--labs", type=int, default=2, choices=range(1, _MOST_LABS // 2 + 1), metavar="N")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--drop", metavar="VERSION", action="append", default=[], help="commit; '' is any that is older"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where trials are kept")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    asked = parser.parse_args(words)
    asked.kind = tuple(asked.kind or BOTH)
    lacking = missing_for_hosts() or (missing_for_slurm() if "slurm" in asked.kind else "")
    if asked.repeat and lacking:
        sys.stderr.write(f"no trial is run: {lacking}\n")
        return 69
    if SEAL in os.environ:
        return int(_trials(asked) > 0)
    if asked.drop:
        dropped = drop(asked.drop, kinds=asked.kind, only=asked.only, results=asked.results)
        sys.stdout.write(f"forgot {dropped} trials\n")
    try:
        return sealed([sys.executable, "-m", __spec__.name, *_again(asked)]) if asked.repeat else 0
    finally:
        if asked.write:
            PAGE.write_text(page(asked.results))


def _again(asked: argparse.Namespace) -> list[str]:
    """The words for the same trials, of what is sealed."""
    numbers = [f"--{name}={getattr(asked, name)}" for name in ("repeat", "only", "labs", "seed", "results")]
    return [*numbers, *(f"--kind={kind}" for kind in asked.kind)]


def _trials(asked: argparse.Namespace) -> int:
    """Runs what is left of all faults on all kinds of cluster; how many trials were not as they must be."""
    works, writing = list[_Work](), Lock()
    for kind in asked.kind:
        due = still_due(kind, asked.repeat, only=asked.only, results=asked.results)
        works.append(_Work(kind, asked, version(), writing, deque(enumerate(due))))
    labs = [(work, index) for index in range(asked.labs) for work in works if index < len(work.due)]
    with ThreadPoolExecutor(_MOST_LABS) as pool:
        return sum(pool.map(lambda each: each[1][0].run(each[0]), enumerate(labs)))


@dataclass
class _Work:
    """Trials on one kind of cluster, which labs take one after the other.

    Args:
        kind: of cluster.
        asked: seed of the moments at which faults strike, and where trials are kept.
        version: of what is tried.
        writing: held by who adds a trial.
        due: numbered.
    """

    kind: Kind
    asked: argparse.Namespace
    version: str
    writing: Lock
    due: deque[tuple[int, Fault]]

    def __post_init__(self) -> None:
        self._lock, self._expected = Lock(), dict[int, float]()

    def run(self, number: int) -> int:
        """Runs trials in one lab as long as there are some; how many were not as they must be."""
        bad, breaks = 0, 0
        while self.due and breaks < _BREAKS:
            try:
                with lab(self.kind, number) as place:
                    with self._lock:
                        self._expected = self._expected or undisturbed(self.kind, *place)
                    while taken := self._take():
                        bad += self._try(*taken, *place)
            except _BROKEN as error:
                breaks += 1
                sys.stderr.write(f"a lab of {self.kind} broke, and is made anew: {type(error).__name__}: {error}\n")
        return bad + breaks

    def _take(self) -> tuple[int, Fault] | None:
        with suppress(IndexError):
            return self.due.popleft()
        return None

    def _try(self, index: int, fault: Fault, folder: Path, hosts: Hosts, slurm: Slurm | None) -> bool:
        """Runs one trial, and writes it down whatever comes of it; whether something was wrong."""
        where = folder / f"f{os.getpid()}-{self.kind}-{index:03}-{fault.name.replace(' ', '-')}"
        bench = Bench(self.kind, where, hosts, slurm, variables=fault.variables, cluster=fault.cluster)
        trial = None
        try:
            trial = attempt(fault, bench, self._expected, random.Random(f"{self.asked.seed}-{index}"))
        except _BROKEN as error:
            trial = broken(fault, bench, error)
            raise
        finally:
            fault.mend(bench)
            bench.restore()
            bench.close()
            if trial is not None:
                with self.writing:
                    _keep(replace(trial, version=self.version), where, self.asked.results)
        if slurm is not None:
            slurm.mend()
        return not trial.good


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
