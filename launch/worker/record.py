"""What steps of a scheduled job were like: figures for metrics.jsonl, trace.json, timeline.png with the plan above.

Steps that are logged are recorded, but the first: there collectives are counted, routes are looked for and memory is
asked for the first time. Files show the first step that is recorded; it draws nothing while the job runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meshwright.launch.spec.job import Job
from meshwright.launch.worker.counters import Counters
from meshwright.launch.worker.experts import ExpertLoads
from meshwright.launch.worker.plot import plot_losses
from meshwright.parallel.errors import PlotError
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.measured import costs_of
from meshwright.parallel.pipeline.picture import draw_picture
from meshwright.parallel.pipeline.timeline import Timeline, timeline
from meshwright.parallel.pipeline.trace import trace
from meshwright.parallel.wrap import ParallelModel

__all__ = ["StepFiles", "figures", "files_of"]


def figures(found: Timeline) -> dict[str, float | int]:
    """Records of one step for metrics.jsonl: of this rank and the others along `pp`.

    >>> figures(Timeline((), 3.0, (2.0, 1.0)))
    {'bubble': 0.5, 'exposed_communication_s': 0.0, 'gathers': 0, 'reductions': 0}
    """
    return {
        "bubble": round(found.bubble, 4),
        "exposed_communication_s": round(sum(found.exposed) / found.num_ranks, 6),
        "gathers": found.count(Kind.GATHER),
        "reductions": found.count(Kind.REDUCE),
    }


@dataclass
class StepFiles:
    """loss.png, trace.json, timeline.png and experts.png of a run.

    Args:
        run_dir: where rank 0 writes them.
        title: of the pictures: the job and its mesh.
        order: of its steps, by name.
        schedule: of every step; None where there is none.
        experts: what is known of their load.
        counters: of rank 0's host and GPU.
    """

    run_dir: Path
    title: str
    order: str
    schedule: Schedule | None
    experts: ExpertLoads
    counters: Counters
    step: int = 0
    _found: Timeline | None = None

    def read(self) -> dict[str, Any]:
        """Figures since the last call; every rank must ask."""
        return {**self.experts.read(), **self.counters.read()}

    def take(self, found: Timeline, step: int) -> None:
        """Writes the trace of the first step that is given."""
        if self._found is None:
            self._found, self.step = found, step
            (self.run_dir / "trace.json").write_text(trace(found))

    def draw(self, history: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
        """Draws what there is to draw; says of each where it lies, or why it does not.

        Args:
            history: records of metrics.jsonl.
            say: where lines for people go.
        """
        path = self.run_dir / "loss.png"
        missing = plot_losses(history, path, title=self.title)
        say(f"loss curve: {path}" if missing is None else f"no loss.png: {missing}")
        for said in (self._draw_step(), self.experts.draw(self.run_dir / "experts.png")):
            if said:
                say(said)

    def _draw_step(self) -> str | None:
        """Draws that step below its plan, timed with what it took; returns what to say of it."""
        if self._found is None or self.schedule is None:
            return None
        path = self.run_dir / "timeline.png"
        planned = timeline(self.schedule, costs_of(self._found))
        above = f"{self.title}, {self.order}, planned with the measured times of blocks, communication free"
        try:
            draw_picture({above: planned, f"step {self.step}, measured": self._found}, path)
        except PlotError as error:
            return f"no timeline.png: {error}"
        return f"step {self.step}, planned and measured: {path}; {path.with_name('trace.json')} for Perfetto"


def files_of(job: Job, model: ParallelModel, run_dir: Path, *, device: torch.device) -> StepFiles:
    """Those of a job that trains."""
    assert job.train is not None, "checked when the job was read"
    return StepFiles(
        run_dir,
        title=f"{job.name}: {model.mesh}",
        order=str(job.parallel.schedule),
        schedule=model.schedule,
        experts=ExpertLoads(model, balance_rate=job.train.balance_rate),
        counters=Counters(device, active=model.rank == 0),
    )
