"""What a job will need, send and take, on paper: from its own model, on shapes, without starting a rank.

Bytes of states per rank are exact, and so are the collectives of one step where the wrap report knows them. Seconds and
the memory of a step are predicted (see `meshwright.clusters.simulated`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.paper.text import bytes_line, forecast_lines
from meshwright.parallel.errors import MeshwrightError, WrapError

if TYPE_CHECKING:
    from meshwright.clusters.simulated.forecast import Forecast
    from meshwright.launch.paper.drawing import Drawing
    from meshwright.launch.paper.hardware import Hardware
    from meshwright.parallel.ledger import LedgerSummary

__all__ = ["Prediction", "simulate"]


@dataclass(frozen=True)
class Prediction:
    """Largest bytes one rank keeps between steps, what it sends in one, and what a step takes.

    Attributes:
        mesh: the mesh, printed.
        num_parameters: of the whole model.
        parameter_bytes: parameters kept by one rank.
        gradient_bytes: gradients after a step on one rank.
        optimizer_bytes: AdamW's two moments on one rank.
        sent_bytes_per_step: what one rank sends in one step with ring algorithms; None where it is not known exactly.
        collectives: the calls of one step by axis and kind; None likewise.
        forecast: time and memory of a step; None where the model asks its tensors for values.
        scaling: (GPUs, tokens per second) of the same job with more and fewer replicas.
        notes: what was assumed, or could not be told and why.
    """

    mesh: str
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    sent_bytes_per_step: float | None
    collectives: list[dict[str, object]] | None
    forecast: "Forecast | None" = None
    scaling: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        told = {**vars(self), "forecast": None if self.forecast is None else self.forecast.as_dict()}
        told["scaling"] = [{"gpus": gpus, "tokens_per_s": rate} for gpus, rate in self.scaling]
        return {**told, "notes": list(self.notes)}

    def __str__(self) -> str:
        kept = {"parameters": self.parameter_bytes, "gradients": self.gradient_bytes, "optimizer": self.optimizer_bytes}
        sent = "not told exactly" if self.sent_bytes_per_step is None else f"{self.sent_bytes_per_step:,.0f}"
        lines = [
            f"{self.mesh}: {self.num_parameters:,} parameters",
            bytes_line(kept),
            f"  bytes sent in one step   {sent:>18}",
        ]
        if self.forecast is not None:
            lines += ["", *forecast_lines(self.forecast)]
        return "\n".join([*lines, *(f"  note: {each}" for each in self.notes)])


def simulate(
    job: LoadedJob | Path | str,
    overrides: Sequence[str] = (),
    *,
    gpu: str | Path | None = None,
    network_gbps: float | None = None,
    scaling: bool = False,
) -> Prediction:
    """Predicts a job without starting it; any number of ranks.

    Args:
        job: a job file, or one that was loaded.
        overrides: "dotted.key=value", as for `load_job`.
        gpu: name of the GPUs, or a .yaml of `meshwright doctor --calibrate`; `resources.gpu_type` by default.
        network_gbps: Gbit/s between nodes, per GPU and direction; what such nodes usually have by default.
        scaling: predict the job with more and fewer replicas, too.

    Raises:
        JobError: when the job cannot be read, trains no model, its mesh cannot be had, or nobody knows the GPU.
    """
    from meshwright.launch.paper.hardware import hardware_of

    loaded = job if isinstance(job, LoadedJob) else load_job(job, overrides)
    if loaded.job.model is None:
        text = "the job runs a command, so nothing is known of its model; give it model: and data:"
        raise JobError([Problem(loaded.where("model"), "model", text)])
    hardware = hardware_of(loaded, gpu_name=None if gpu is None else str(gpu), network_gbps=network_gbps)
    try:
        return _predicted(loaded, hardware, scaling=scaling)
    except JobError:
        raise
    except MeshwrightError as error:
        raise JobError([Problem(loaded.where("parallel"), "parallel", str(error))]) from error


def _predicted(loaded: LoadedJob, hardware: "Hardware", *, scaling: bool) -> Prediction:
    from meshwright.launch.paper.advice import advised, scaling_of
    from meshwright.launch.paper.drawing import forecast, run_on_paper
    from meshwright.parallel.report import kept_elements

    job, dealt = loaded.job, _dealt(loaded)
    kept = kept_elements(dealt.mine, job.mesh, dealt.options, experts=dealt.plans.experts)
    bytes_of = {each: number * each.element_size() for each, number in kept.items()}
    trained_bytes = sum(number for each, number in bytes_of.items() if each.requires_grad)
    known = _collectives(loaded, dealt)
    found, points = None, tuple[tuple[int, float], ...]()
    notes = (*hardware.notes, *dealt.notes)
    try:
        drawing = run_on_paper(loaded, dealt, hardware)
        found = advised(forecast(drawing, job, hardware), drawing, job=job, hardware=hardware)
        points = scaling_of(drawing, job, hardware) if scaling else ()
    except WrapError as error:
        notes += (f"activations and time are not predicted: {error}",)
    return Prediction(
        mesh=str(job.mesh),
        num_parameters=sum(each.numel() for each in dealt.model.parameters()),
        parameter_bytes=sum(bytes_of.values()),
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        sent_bytes_per_step=None if known is None else float(known.sent_bytes()),
        collectives=None if known is None else known.as_dict(),
        forecast=found,
        scaling=points,
        notes=notes,
    )


def _dealt(loaded: LoadedJob) -> "Drawing":
    from meshwright.launch.paper.drawing import deal_on_paper
    from meshwright.launch.rehearse import model_on_meta

    try:
        return deal_on_paper(loaded, model_on_meta(loaded, values=False))
    except WrapError:  # a model that asks for values while it is dealt gets them, which takes longer
        return deal_on_paper(loaded, model_on_meta(loaded))


def _collectives(loaded: LoadedJob, dealt: "Drawing") -> "LedgerSummary | None":
    """Those of a step by formula, equal to what the ledger counts."""
    from meshwright.parallel.report import describe

    mesh = loaded.job.mesh
    if not dealt.is_proved and (mesh.tp > 1 or mesh.cp > 1):
        return None
    return describe(dealt.model, mesh, dealt.options, dealt.plans).collectives
