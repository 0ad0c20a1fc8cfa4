"""Measurements one after the other within a given time: what fails is printed and noted, and the rest goes on."""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.device import Device

__all__ = ["Sections", "aligned", "asked"]


class Sections:
    """What was measured so far, kept in a file after each section.

    Args:
        device: under measurement.
        seconds: for all sections; one that would begin later is left out.
        path: of the file; None for none.
        tiny: whether sizes are those of a trial run.
    """

    def __init__(self, device: Device, *, seconds: float, path: Path | None, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        self.found: dict[str, Any] = {"tiny": tiny, **device.described, "sections": {}}
        self._end_s = time.monotonic() + seconds
        self.path = path

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._end_s - time.monotonic()

    def run(self, name: str, measure: Callable[[], Any], *, needs_s: float = 0.0) -> Any:
        """Notes and returns what a section measures; None where it failed or there is no time for it."""
        start_s = time.monotonic()
        made: Any = None
        if self.left_s < needs_s:
            noted: Any = {"skipped": f"{self.left_s:.0f} s left of {needs_s:.0f} s needed"}
        else:
            try:
                noted = made = measure()
            except Exception as error:  # the next section may work
                traceback.print_exc()
                noted = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.found["sections"][name] = noted
        sys.stderr.write(f"[{time.monotonic() - start_s:6.1f} s, {self.left_s:6.1f} s left] {name}\n")
        sys.stderr.flush()
        if self.path is not None:
            part = self.path.with_name(f"{self.path.name}.part")
            part.write_text(json.dumps(self.found, indent=1) + "\n")
            part.replace(self.path)  # whole, also for who reads it after this process was stopped
        self.device.clear()
        return made


def asked(document: str | None, *, seconds: float) -> Sections:
    """What the command line asks for.

    Args:
        document: for `--help`.
        seconds: to be had where it does not say.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a trial run")
    parser.add_argument("--seconds", type=float, default=seconds, help="no section begins later")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH", help="one JSON object in this file")
    given = parser.parse_args()
    return Sections(Device(given.device), seconds=given.seconds, path=given.json, tiny=given.tiny)


def aligned(rows: list[list[str]]) -> str:
    """A table; the first column to the left, the others to the right.

    >>> print(aligned([["", "ms"], ["ours", "1.5"], ["theirs", "12.0"]]), end="")
              ms
    ours     1.5
    theirs  12.0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [each.rjust(width) for each, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines) + "\n"
