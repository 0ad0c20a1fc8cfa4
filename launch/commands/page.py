"""`meshwright page`: one self-contained HTML file about a run."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.page.write import write_page
from meshwright.launch.runs import find_run, standing

__all__ = ["page"]


def page(
    run: Annotated[str, typer.Argument(help="Id of a run, or a directory with metrics.jsonl.")],
    *,
    output: Annotated[Path | None, typer.Option(help="File to write; page.html in the run directory.")] = None,
) -> None:
    """Write a page of a run: loss, speed, utilisation, restarts; also while it runs."""
    run_dir, state = _found(run)
    sys.stdout.write(f"page: {write_page(run_dir, state=state, output=output)}\n")


def _found(run: str) -> tuple[Path, str | None]:
    """The directory, and how the run stands; nobody knows that of one that `meshwright launch` did not make."""
    folder = Path(run)
    if os.path.exists(folder / "metrics.jsonl") and not os.path.exists(folder / "launch.json"):
        return folder, None
    known = find_run(run)
    return Path(known.run_dir), standing(known).state
