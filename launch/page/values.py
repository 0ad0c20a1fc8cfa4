"""Values of a run's files, which may hold anything."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["finite", "json_of", "lines_of", "listed", "number"]


def number(value: object) -> float | None:
    """A number of a JSON file as a float, NaN too; None for everything else.

    >>> number(3), number(True), number("3"), number(10**400)
    (3.0, None, None, None)
    """
    if type(value) is float:  # the usual case, millions of times
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def finite(value: object) -> float | None:
    """The same, of numbers that are one.

    >>> finite(3), finite(math.inf)
    (3.0, None)
    """
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def json_of(path: Path) -> object:
    """What a file says; None where it is missing, or torn."""
    try:
        return json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None


def lines_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file of lines; one that is being written, or was cut off with the disk full, is passed over."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def listed(found: object) -> list[Mapping[str, Any]]:
    """The maps of a list; none of anything else.

    >>> listed([{"a": 1}, 3]), listed("x")
    ([{'a': 1}], [])
    """
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
