"""Writes the page of a run beside what it was made from, or where it is asked for."""

import sys
from collections.abc import Callable
from pathlib import Path

from meshwright.launch.page.document import Live, document
from meshwright.launch.page.read import read_view
from meshwright.launch.rundir import write_text

__all__ = ["PAGE", "try_to_write_page", "write_page"]

PAGE = "page.html"


def write_page(
    run_dir: Path,
    *,
    state: str | None = None,
    output: Path | None = None,
    live: Live | None = None,
    if_wanted: Callable[[], bool] = lambda: True,
) -> Path:
    """Writes one HTML file, readable by this user only; returns where.

    Args:
        run_dir: of the run; may hold nothing but metrics.jsonl.
        state: how the run stands, where there is no exit record.
        output: the file; page.html in the run directory unless given.
        live: where the run goes on, and its page is written again.
        if_wanted: of such a page; asked whether it is still to take the place of the one before.

    Raises:
        RunDirError: when it cannot be written.
    """
    path, text = run_dir / PAGE if output is None else output, document(read_view(run_dir, state), live)
    if live is None:
        write_text(path, text)
    else:  # the last page may be written meanwhile
        write_text(path, text, part="live.part", if_wanted=if_wanted)
    return path


def try_to_write_page(run_dir: Path) -> None:
    """The same at the end of a run, whose outcome a page must not change: an error is only said."""
    try:
        write_page(run_dir)
    except Exception as error:
        sys.stderr.write(f"meshwright: no {PAGE}: {type(error).__name__}: {error}\n")
