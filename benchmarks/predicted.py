"""Jobs predicted for this machine from its calibration, then run on it: seconds, collectives and memory of a step.

`python -m benchmarks.predicted [--calibration FILE] [--only WORDS] [--repeat N] [--json]`

Without a file the machine is calibrated first. Each job (see `predicted_jobs`) has 2 to 8 ranks of this machine and is
launched as a user would; its first steps are left out. Seconds want a quiet machine that stays as it was when it was
calibrated: a fixed piece of work tells before and after each launch (see `pace`), and a launch counts where that takes
within 5 % of then. Up to three times as many are tried as are wanted; where none counts the nearest does, and the line
says how the machine was. Calls of every rank and live bytes
are those of a second step without an optimizer; they are compared with those of the same rank run without values, call
by call, and memory of the fullest rank with the forecast of `simulate`, too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

import meshwright as mw
from benchmarks import fake_ranks
from benchmarks.pace import Pace, Paced, nearest
from benchmarks.predicted_jobs import JOBS, VOCABULARY, Small
from meshwright.launch.load import load_job
from meshwright.parallel.errors import WrapError

__all__ = ["WARM_STEPS", "Outcome", "calibrate", "launched", "outcomes", "summary"]

WARM_STEPS, _STEPS = 4, 16
_TRIES, _WITHIN = 3, 0.05
_GROUPS = "other", "later"


@dataclass(frozen=True)
class Outcome:
    """One job.

    Args:
        name: of the job.
        predicted_s: of a step.
        measured_s: the median of what was logged.
        pace: seconds of a fixed piece of work around these launches over those when the machine was calibrated.
        causes: seconds by cause, as predicted.
        calls: of all ranks in a step.
        equal_ranks: how many of its ranks call what was predicted, in that order; None where that is not told.
        ranks: all of them.
        memory_error: bytes of the rank without values over measured ones, less one, of the rank where that is most;
            None where it cannot be run.
        forecast_error: predicted over measured bytes of the fullest rank, less one.
    """

    name: str
    predicted_s: float
    measured_s: float
    pace: float
    causes: Mapping[str, float]
    calls: int
    equal_ranks: int | None
    ranks: int
    memory_error: float | None
    forecast_error: float

    @property
    def error(self) -> float:
        """Predicted over measured seconds, less one."""
        return self.predicted_s / self.measured_s - 1

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name} {1e3 * each:.1f}" for name, each in self.causes.items() if each > 0.02 * self.predicted_s
        )
        times = f"{1e3 * self.predicted_s:8.1f} ms predicted {1e3 * self.measured_s:8.1f} ms measured"
        pace = f"machine at {self.pace:.2f}"
        told = "not told"
        if self.equal_ranks is not None and self.memory_error is not None:
            told = f"as predicted on {self.equal_ranks} of {self.ranks} ranks, memory {self.memory_error:+.1%}"
        besides = f"{self.calls} calls {told}, forecast of memory {self.forecast_error:+.1%}"
        return f"{self.name:24} {times} {self.error:+7.1%} ({pace})   {besides}   {shown}"


def outcomes(names: Sequence[str], calibrated: Paced[Path], pace: Pace, *, repeat: int) -> Iterator[Outcome]:
    """Predicts and runs jobs, one after the other."""
    for name in names:
        small = JOBS[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "job.yaml")
            path.write_text(yaml.safe_dump(small.file(steps=WARM_STEPS + _STEPS)))
            found = mw.simulate(path, gpu=calibrated.found).forecast
            assert found is not None, name
            counting = _launches(path, pace, calibrated.pace_s, repeat=repeat)
            calls, equal, error, peaks = _counted(small, path)
        tensors = found.memory.tensor_bytes - found.memory.optimizer
        yield Outcome(
            name=name,
            predicted_s=found.step.total_s,
            measured_s=median(record["step_s"] for each in counting for record in each.found),
            pace=fmean(each.pace_s for each in counting) / calibrated.pace_s,
            causes=dict(vars(found.step)),
            calls=calls,
            equal_ranks=equal,
            ranks=len(peaks),
            memory_error=error,
            forecast_error=tensors / max(peaks) - 1,
        )


def _launches(path: Path, pace: Pace, pace_s: float, *, repeat: int) -> list[Paced[list[dict[str, Any]]]]:
    """Records of launches that count: as many as are wanted while the machine is what it was."""
    several: list[Paced[list[dict[str, Any]]]] = []
    for number in range(_TRIES * repeat):
        several.append(pace.around(partial(launched, path, f"predicted-{number}")))
        counting = nearest(several, pace_s, within=_WITHIN)
        if len(counting) == repeat and abs(counting[0].pace_s / pace_s - 1) <= _WITHIN:
            break
    return counting


def _counted(small: Small, path: Path) -> tuple[int, int | None, float | None, list[int]]:
    """Calls of a step, ranks that call what they do without values, the error of their memory, and measured peaks."""
    job = load_job(path).job
    mine = fake_ranks.Job(
        {**job.mesh.degrees(), **({"ep": job.mesh.ep} if job.mesh.ep > 1 else {})},
        job.options,
        small.build,
        samples=small.batch_size // job.mesh.data_degree,
        length=small.length,
        vocabulary=VOCABULARY,
    )
    real = fake_ranks.real_ranks(mine)
    calls, peaks = sum(len(each) for each, _ in real), [peak for _, peak in real]
    try:
        fakes = list(fake_ranks.paper_ranks(mine))
    except WrapError:
        return calls, None, None, peaks
    equal = sum(fake.calls == each for fake, (each, _) in zip(fakes, real, strict=True))
    errors = [fake.memory.peak_bytes / peak - 1 for fake, peak in zip(fakes, peaks, strict=True)]
    return calls, equal, max(errors, key=abs), peaks


def calibrate(entry: Path) -> str:
    """Measures this machine into an entry of the catalog; what was said of it."""
    words = [sys.executable, "-m", "meshwright.launch.cli", "doctor", "--calibrate", str(entry)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def _entry(given: Path | None, folder: str) -> Path:
    """The entry that was given, or a new one."""
    entry = given or Path(folder, "machine.yaml")
    if given is None:
        calibrate(entry)
    return entry


def launched(path: Path, run_id: str) -> list[dict[str, Any]]:
    """Records of the steps of one launch, the first ones left out."""
    words = [sys.executable, "-m", "meshwright.launch.cli", "launch", str(path), "--run-id", run_id]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run of {path.name} ended with code {done.returncode}: {done.stderr.strip()[-1500:]}")
    records = [json.loads(line) for line in next(path.parent.rglob(f"{run_id}/metrics.jsonl")).open()]
    return [each for each in records if "step_s" in each and each["step"] > WARM_STEPS]


def summary(found: Sequence[Outcome]) -> dict[str, float | int]:
    """Errors over jobs: of the seven, of each group chosen besides, of memory; and calls that were not as predicted.

    >>> one = Outcome("dp", 1.0, 2.0, 1.0, {}, 3, 2, 2, 0.01, 0.02)
    >>> summary([one, Outcome("other: x", 1.5, 1.0, 1.0, {}, 3, None, 2, None, -0.02)])["other_worst_error_percent"]
    50.0
    """
    parts = {"": [each for each in found if not each.name.startswith(_GROUPS)]}
    parts |= {f"{group}_": [each for each in found if each.name.startswith(group)] for group in _GROUPS}
    told: dict[str, float | int] = {}
    for mark, several in parts.items():
        errors = [100 * abs(each.error) for each in several]
        if errors:
            told |= {f"{mark}mean_error_percent": round(fmean(errors), 1)}
            told |= {f"{mark}worst_error_percent": round(max(errors), 1)}
    compared = [each for each in found if each.equal_ranks is not None]
    return {
        **told,
        "memory_worst_error_percent": _worst([each.memory_error for each in compared]),
        "memory_forecast_worst_error_percent": _worst([each.forecast_error for each in found]),
        "ranks_compared": sum(each.ranks for each in compared),
        "ranks_with_other_calls": sum(each.ranks - (each.equal_ranks or 0) for each in compared),
    }


def _worst(errors: Sequence[float | None]) -> float:
    return round(100 * max((abs(each) for each in errors if each is not None), default=0.0), 1)


def main() -> None:
    """Prints one line for each job, and the errors over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--only", default="", help="jobs whose name holds it")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pace, found = Pace(), list[Outcome]()
        entry = pace.around(partial(_entry, told.calibration, folder))
        for each in outcomes([name for name in JOBS if told.only in name], entry, pace, repeat=told.repeat):
            found.append(each)
            sys.stderr.write(f"{each}\n")
    if told.json:
        rows: list[dict[str, Any]] = [{**vars(each), "error": each.error} for each in found]
        sys.stdout.write(json.dumps({**summary(found), "jobs": rows}) + "\n")
        return
    sys.stdout.write("".join(f"{name} {value}\n" for name, value in summary(found).items()))


if __name__ == "__main__":
    main()
