"""Launches from a control machine whose processes are its own, so that what it sweeps is not what runs on hosts."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.launch.worker.runs import MODEL
from tests.launch.worker.runs import write_job as write_tiny

__all__ = [
    "QUICKSTART",
    "ROOT",
    "SHRINKING",
    "SHRINKING_STEPS",
    "Launch",
    "finish",
    "losses",
    "write_job",
    "write_training",
]

ROOT = Path(__file__).resolve().parents[2]
_STEPS = (
    *("parallel.dp=4", "train.steps=3", "train.batch_size=8", "train.log_every_steps=1", "train.validate_batches=1"),
    *("data.max_bytes=256KiB", "data.sequence_length=64"),
)
QUICKSTART: tuple[Any, ...] = (
    ROOT / "examples/quickstart.yaml",
    *(word for each in _STEPS for word in ("--set", each)),
)
"""The example on four ranks, with few small steps: five losses, of which two are of held-out text."""

SHRINKING_STEPS = 40
SHRINKING = ("nproc_per_node=1", "train.precision=float64", "model.arguments={width: 16, dropout: 0.0}")
"""Words of a training whose losses are all but the same on any number of nodes."""

_INIT = """
"$@"; code=$?
for tick in {1..50}; do
  left=(/proc/[0-9]*)
  [ ${#left[@]} -gt 1 ] || break
  sleep 0.1
done
exit $code
"""
"""The first process of a launcher's own: with it all others end, so it waits a while for them to end by themselves."""

_APART = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private")


def finish(launcher: "subprocess.Popen[str]") -> None:
    """Ends a launcher that may have ended, and lets go of it."""
    launcher.kill()
    launcher.wait()
    if launcher.stdout is not None:
        launcher.stdout.close()


def write_job(folder: Path, script: str, **keys: object) -> Path:
    """A job that runs a Python script on every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "j", "command": ["python", "-u", "-c", script], **keys}))
    return path


def write_training(folder: Path, *, steps: int, every: int, pause_s: float = 0.0) -> Path:
    """A tiny model's training, which takes its time at every step, so that something can befall it."""
    path = write_tiny(folder, steps=steps, every=every)
    first = "hidden = self.embed(input_ids)"
    assert first in MODEL
    late = f"__import__('time').sleep({pause_s}); {first}" if pause_s else first
    (folder / "tiny.py").write_text(MODEL.replace(first, late))
    return path


def losses(run_dir: Path) -> list[Any]:
    """Every loss that a run wrote down, in order; floats as they were written."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        (record["step"], name, record[name])
        for record in records
        for name in ("loss", "validation_loss")
        if name in record
    ]


class Launch:
    """`meshwright launch` in a folder.

    Args:
        folder: current directory; runs lie in it.
        clusters: named clusters.
        run_id: of the run.
        env: further variables of the launcher.
    """

    def __init__(
        self, folder: Path, clusters: Mapping[str, Any], run_id: str = "r1", env: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.run_id = folder, run_id
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "settings/meshwright"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "clusters.yaml").write_text(yaml.safe_dump({"clusters": dict(clusters)}))
        own = {"XDG_CONFIG_HOME": str(folder / "settings"), "XDG_STATE_HOME": str(folder / "state")}
        self.env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **own, **(env or {})}

    def words(self, command: str, *more: str) -> list[str]:
        """The words of a command line."""
        return [sys.executable, "-m", "meshwright.launch.cli", command, *more]

    def run(self, job: Path, *more: str, timeout_s: float = 240.0) -> "subprocess.CompletedProcess[str]":
        """Launches to the end."""
        return self.type("launch", str(job), "--run-id", self.run_id, *more, timeout_s=timeout_s)

    def type(self, command: str, *more: str, timeout_s: float = 120.0) -> "subprocess.CompletedProcess[str]":
        """Types any command."""
        return subprocess.run(
            [*_APART, *self.words(command, *more)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(
        self, job: Path, *more: str, output: Any = subprocess.PIPE, apart: bool = False
    ) -> "subprocess.Popen[str]":
        """Launches, and leaves it running; `output` takes what it says.

        The process is the launcher itself, or, if `apart`, what has the launcher among processes of its own.
        """
        own = (*_APART, "bash", "-c", _INIT, "_") if apart else ()
        return subprocess.Popen(
            [*own, *self.words("launch", str(job), "--run-id", self.run_id, *more)],
            cwd=self.folder,
            env=self.env,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def run_dir(self) -> Path:
        """Of a job called j."""
        return self.folder / "runs/j" / self.run_id

    def record(self) -> dict[str, Any]:
        """The exit record."""
        found: dict[str, Any] = json.loads((self.run_dir / "exit.json").read_text())
        return found
