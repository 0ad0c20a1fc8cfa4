"""`meshwright simulate`: how fast a job will be, where its time goes, whether it fits, without starting it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob
from meshwright.launch.predict import Prediction
from meshwright.launch.predict import simulate as predict
from meshwright.launch.variants import load_one

__all__ = ["simulate"]


def simulate(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    sweep_index: Annotated[int | None, typer.Option(help="Run of a job with a sweep.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="H100 or alike, or a .yaml of `meshwright doctor --calibrate`.")
    ] = None,
    network_gbps: Annotated[
        float | None, typer.Option(min=0.001, help="Gbit/s between nodes, per GPU and direction.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png, .svg): time, memory, more and fewer GPUs.")] = None,
    trace: Annotated[Path | None, typer.Option(help="The step's timeline, for ui.perfetto.dev.")] = None,
) -> None:
    """Print whether a job fits, how long a step takes and why, and the bytes that one rank keeps and sends."""
    loaded = load_one(job, overrides or (), sweep_index)
    prediction = predict(loaded, gpu=gpu, network_gbps=network_gbps, scaling=plot is not None)
    _write(prediction, loaded, plot=plot, trace=trace)
    sys.stdout.write(json.dumps(prediction.as_dict()) + "\n" if as_json else f"{prediction}\n")


def _write(prediction: Prediction, loaded: LoadedJob, *, plot: Path | None, trace: Path | None) -> None:
    """Writes the files that were asked for."""
    wanted = next((f"--{name}" for name, path in (("plot", plot), ("trace", trace)) if path is not None), None)
    if wanted is None:
        return
    if prediction.forecast is None:
        raise JobError([Problem(loaded.where("model"), wanted, "; ".join(prediction.notes))])
    if plot is not None:
        from meshwright.launch.paper.picture import draw_forecast

        draw_forecast(prediction, plot)
    if trace is not None:
        from meshwright.parallel.pipeline.trace import trace as as_trace

        trace.write_text(as_trace(prediction.forecast.paper.timeline), encoding="utf-8")
