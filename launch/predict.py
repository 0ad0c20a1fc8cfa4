"""What a job will keep and send, on paper: from the shapes of its model, without starting a rank.

Bytes of states per rank and the collectives of one step are exact for the axes `dp` and `fsdp`. Activations and
times are not predicted by this version.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob, load_job

if TYPE_CHECKING:
    pass

__all__ = ["Prediction", "simulate"]


@dataclass(frozen=True)
class Prediction:
    """Largest bytes one rank keeps between steps, and what it sends in one.

    Attributes:
        mesh: the mesh, printed.
        num_parameters: of the whole model.
        parameter_bytes: parameters kept by one rank.
        gradient_bytes: gradients after a step on one rank.
        optimizer_bytes: AdamW's two moments on one rank.
        sent_bytes_per_step: what one rank sends in one step with ring algorithms; None for DeepSpeed.
        collectives: the calls of one step by axis and kind; None for DeepSpeed.
    """

    mesh: str
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    sent_bytes_per_step: float | None
    collectives: list[dict[str, object]] | None

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)

    def __str__(self) -> str:
        state_bytes = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        sent = "not predicted" if self.sent_bytes_per_step is None else f"{self.sent_bytes_per_step:,.0f}"
        return (
            f"{self.mesh}: {self.num_parameters:,} parameters\n"
            f"  bytes kept by one rank   {state_bytes:>18,}  (parameters {self.parameter_bytes:,}, "
            f"gradients {self.gradient_bytes:,}, optimizer {self.optimizer_bytes:,})\n"
            f"  bytes sent in one step   {sent:>18}\n"
            f"  activations and time     {'not predicted':>18}"
        )


def simulate(job: LoadedJob | Path | str, overrides: Sequence[str] = ()) -> Prediction:
    """Predicts a job without starting it; any number of ranks.

    Args:
        job: a job file, or one that was loaded.
        overrides: "dotted.key=value", as for `load_job`.

    Raises:
        JobError: when the job cannot be read or trains no model.
        WrapError: when its mesh cannot be had.
    """
    from meshwright.launch.rehearse import report_on_meta, settled_on_meta
    from meshwright.parallel.plan import make_expert_plan
    from meshwright.parallel.report import kept_elements

    loaded = job if isinstance(job, LoadedJob) else load_job(job, overrides)
    if loaded.job.model is None:
        text = "the job runs a command, so nothing is known of its model; give it model: and data:"
        raise JobError([Problem(loaded.where("model"), "model", text)])
    mesh = loaded.job.mesh
    model, report = report_on_meta(loaded)
    options = settled_on_meta(loaded, model)
    kept = kept_elements(model, mesh, options, experts=make_expert_plan(model, mesh, options))
    bytes_of = {each: number * each.element_size() for each, number in kept.items()}
    trained_bytes = sum(number for each, number in bytes_of.items() if each.requires_grad)
    known = report.collectives
    return Prediction(
        mesh=str(mesh),
        num_parameters=report.num_parameters,
        parameter_bytes=sum(bytes_of.values()),
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        sent_bytes_per_step=None if known is None else float(known.sent_bytes()),
        collectives=None if known is None else known.as_dict(),
    )
