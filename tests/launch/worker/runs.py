"""Real launches of a tiny model, for tests: a job in a folder, its processes, its end.

Where a test is about what the program computes and not about its processes, `train_here` runs it on the ranks that all
tests share: a launch imports torch once for each rank.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshwright.launch.load import load_job
from meshwright.testing import run_ranks
from tests.launch.own import own

MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.embed = nn.Embedding(257, width)
        nn.init.normal_(self.embed.weight, std=0.2)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 257, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, labels, attention_mask=None, position_ids=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        scores = self.head(hidden)[:, :-1]
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten())}


def build(width=16, dropout=0.1):
    return Tiny(width, dropout)
"""

JOB = """
name: tiny
workdir: .
model: {{python: "tiny:build", arguments: {{width: 16}}}}
data: {{files: [text.txt, more.txt], sequence_length: 32, validation_fraction: 0.2}}
parallel: {parallel}
train:
  steps: {steps}
  batch_size: 8
  log_every_steps: 1
  validate_batches: 1
  optimizer: {{lr: 1e-2}}
checkpoint: {{every_steps: {every}, dir: {folder}/checkpoints}}
logs: {{dir: "{folder}/runs/{{run_id}}"}}
failure: {{shutdown_grace: 5s}}
"""


def write_job(folder: Path, *, parallel: str = "{dp: 2}", steps: int = 20, every: int = 3) -> Path:
    """A job whose every file lies in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.py").write_text(MODEL)
    for name, first in (("text.txt", 0), ("more.txt", 200)):
        lines = (f"the quick brown fox jumps over {number} lazy dogs\n" for number in range(first, first + 200))
        (folder / name).write_text("".join(lines))
    path = folder / "job.yaml"
    path.write_text(JOB.format(parallel=parallel, steps=steps, every=every, folder=folder))
    return path


def start(job: Path, run_id: str, *overrides: str) -> subprocess.Popen[str]:
    """The launcher, running; it has a process group of its own."""
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "meshwright.launch.cli", "launch", str(job), "--run-id", own(run_id), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=job.parent
    )


def finish(job: Path, run_id: str, *overrides: str, timeout_s: float = 300.0) -> tuple[int, str]:
    """Launches and waits; returns exit code and output."""
    process = start(job, run_id, *overrides)
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def train_here(job: Path, run_id: str, *overrides: str) -> str:
    """Runs the training program of a job on shared ranks, without a launch; returns what it says.

    Raises:
        MeshwrightError: where a launch would end with its words and its code.
    """
    folder = run_dir(job, run_id)
    folder.mkdir(parents=True)
    mesh = load_job(job, overrides).job.mesh
    return str(run_ranks(_train, mesh, job, folder, overrides)[0])


def _train(job: Path, folder: Path, overrides: tuple[str, ...]) -> str:
    import torch

    from meshwright.launch.worker.train import build_training

    said: list[str] = []
    here = os.getcwd()
    os.chdir(job.parent)
    sys.path.insert(0, str(job.parent))
    sys.modules.pop("tiny", None)  # the last test's
    try:
        say: Callable[[str], None] = said.append
        build_training(load_job(job, overrides).job, folder, device=torch.device("cpu"), say=say).run()
    finally:
        sys.path.remove(str(job.parent))
        os.chdir(here)
    return "\n".join(said)


def run_dir(job: Path, run_id: str) -> Path:
    return job.parent / "runs" / own(run_id)


def metrics(job: Path, run_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir(job, run_id) / "metrics.jsonl").read_text().splitlines()]


def losses(job: Path, run_id: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in metrics(job, run_id) if "loss" in record]


def final_states(job: Path, steps: int) -> dict[str, Any]:
    """Everything the last checkpoint holds, whole: parameters, optimizer states, step count."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = job.parent / "whole.pt"
    dcp_to_torch_save(job.parent / "checkpoints" / f"step-{steps:08d}", whole)
    found: dict[str, Any] = torch.load(whole, weights_only=False)
    return found


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of tensors that are not bit for bit equal."""
    import torch

    if isinstance(one, dict):
        assert one.keys() == other.keys(), (one.keys(), other.keys())
        return [found for key in one for found in differing(one[key], other[key], f"{name}.{key}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [name]
