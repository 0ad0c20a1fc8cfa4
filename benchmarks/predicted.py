"""Jobs predicted for this machine from its calibration, then run on it: seconds of a step beside those measured.

`python -m benchmarks.predicted [--calibration FILE] [--only WORDS] [--repeat N] [--json]`

Without a file the machine is calibrated first. Each job is a small llama on 2 to 8 ranks of this machine, launched as a
user would; its first steps are left out. That calls and memory are what was predicted is shown by
`benchmarks.fake_ranks`; this looks at time alone, so it wants a quiet machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

import meshwright as mw

__all__ = ["JOBS", "Outcome", "outcomes"]

_WARM_STEPS, _STEPS = 4, 16
_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}

JOBS: Mapping[str, Mapping[str, Any]] = {
    "dp": {"dp": 2},
    "fsdp, layered": {"fsdp": 2, "schedule": "layered", "num_microbatches": 2},
    "tp": {"tp": 2, "sequence_parallel": True},
    "pp, modular": {"pp": 2, "schedule": "modular", "num_microbatches": 4},
    "cp": {"cp": 2},
    "dp x tp": {"dp": 2, "tp": 2},
    "pp x fsdp x tp": {"pp": 2, "fsdp": 2, "tp": 2, "schedule": "1f1b", "num_microbatches": 4},
}
"""`parallel:` of each job."""


@dataclass(frozen=True)
class Outcome:
    """One job.

    Args:
        name: of the job.
        predicted_s: of a step.
        measured_s: the median of what was logged.
        causes: seconds by cause, as predicted.
    """

    name: str
    predicted_s: float
    measured_s: float
    causes: Mapping[str, float]

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.measured_s - 1

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name} {1e3 * each:.1f}" for name, each in self.causes.items() if each > 0.02 * self.predicted_s
        )
        times = f"{1e3 * self.predicted_s:8.1f} ms predicted {1e3 * self.measured_s:8.1f} ms measured"
        return f"{self.name:16} {times} {self.error:+7.1%}   {shown}"


def job_of(parallel: Mapping[str, Any]) -> dict[str, Any]:
    """The whole job file of one mesh."""
    return {
        "version": 1,
        "name": "predicted",
        "model": {"architecture": "llama", "config": _MODEL},
        "data": {"files": "python-stdlib", "tokenizer": "bytes", "sequence_length": 256, "max_bytes": "1MiB"},
        "parallel": dict(parallel),
        "train": {"steps": _WARM_STEPS + _STEPS, "batch_size": 8, "log_every_steps": 1, "clip_norm": None},
        "cluster": {"type": "local"},
    }


def outcomes(names: list[str], calibration: Path, *, repeat: int) -> Iterator[Outcome]:
    """Predicts and runs jobs, one after the other."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "job.yaml")
            path.write_text(yaml.safe_dump(job_of(JOBS[name])))
            found = mw.simulate(path, gpu=calibration).forecast
            assert found is not None, name
            logged = [each for number in range(repeat) for each in _run(path, number)]
            yield Outcome(name, found.step.total_s, median(logged), dict(vars(found.step)))


def _run(path: Path, number: int) -> list[float]:
    """Seconds of steps of one launch, the first ones left out."""
    words = [sys.executable, "-m", "meshwright.launch.cli", "launch", str(path), "--run-id", f"predicted-{number}"]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run of {path.name} ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
    records = [json.loads(line) for line in next(path.parent.rglob(f"predicted-{number}/metrics.jsonl")).open()]
    steps = [each for each in records if "step_s" in each]
    return [each["step_s"] for each in steps if each["step"] > _WARM_STEPS]


def main() -> None:
    """Prints one line for each job, and the mean error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--only", default="", help="jobs whose name holds it")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entry = told.calibration or Path(folder, "machine.yaml")
        if told.calibration is None:
            words = [sys.executable, "-m", "meshwright.launch.cli", "doctor", "--calibrate", str(entry)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        found = []
        for each in outcomes([name for name in JOBS if told.only in name], entry, repeat=told.repeat):
            found.append(each)
            sys.stderr.write(f"{each}\n")
    errors = [abs(each.error) for each in found]
    shown = {"mean_error_percent": round(100 * fmean(errors), 1), "worst_error_percent": round(100 * max(errors), 1)}
    if told.json:
        rows = [{**vars(each), "error": each.error} for each in found]
        sys.stdout.write(json.dumps({**shown, "jobs": rows}) + "\n")
        return
    sys.stdout.write("".join(f"{name} {value}\n" for name, value in shown.items()))


if __name__ == "__main__":
    main()
