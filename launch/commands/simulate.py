"""`meshwright simulate`: what a job will keep and send, without starting it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.predict import simulate as predict
from meshwright.launch.variants import load_one

__all__ = ["simulate"]


def simulate(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    sweep_index: Annotated[int | None, typer.Option(help="Run of a job with a sweep.")] = None,
) -> None:
    """Print the bytes that one rank keeps and sends; activations and times are not predicted yet."""
    prediction = predict(load_one(job, overrides or (), sweep_index))
    sys.stdout.write(json.dumps(prediction.as_dict()) + "\n" if as_json else f"{prediction}\n")
