"""Values of job files with units, names and templates: text on one side, seconds and bytes on the other.

Each parser raises ValueError with what was expected; who knows the position adds it and the value found.
"""

import re
from collections.abc import Iterable
from decimal import Decimal
from string import Formatter

from meshwright.parallel.errors import nearest

__all__ = [
    "DIRECTORY_FIELDS",
    "PREFIX_FIELDS",
    "check_line",
    "check_name",
    "check_template",
    "check_variable",
    "fill",
    "format_duration",
    "parse_duration",
    "parse_size",
]

DIRECTORY_FIELDS = ("name", "run_id")
"""Fields of a directory template, and of the words of a command."""

PREFIX_FIELDS = ("host", "rank")
"""Fields of the prefix of a log line."""

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|s|m|h|d))+")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_MAX_DURATION_S = 10 * 365 * 86400.0
_UNIT_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNIT_BYTES |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")
_MAX_BYTES = 2**63 - 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parse_duration(value: object) -> float:
    """Seconds of "90s", "10m", "1h30m"; 0 needs no unit.

    >>> parse_duration("1h30m"), parse_duration("250ms")
    (5400.0, 0.25)

    Raises:
        ValueError: for a number without a unit, or text that is no duration.
    """
    if value == 0 and not isinstance(value, bool):
        return 0.0
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"expected a duration with its unit, such as {value:g}s or {value:g}m")
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        raise ValueError("expected a duration such as 90s, 10m, 24h or 1h30m")
    seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(value))
    if seconds > _MAX_DURATION_S:
        raise ValueError("expected a duration of at most ten years")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as the same number.

    >>> [format_duration(seconds) for seconds in (600.0, 5400.0, 0.25, 0.0)]
    ['10m', '1h30m', '0.25s', '0s']
    """
    if seconds != int(seconds):
        return f"{format(Decimal(repr(seconds)), 'f')}s"
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "m"), (rest_s, "s")) if number]
    return "".join(parts) or "0s"


def parse_size(value: object) -> int:
    """Bytes of "900GiB", "4MiB", "1.5GB"; a bare integer is bytes.

    >>> parse_size("4MiB"), parse_size(512)
    (4194304, 512)

    Raises:
        ValueError: for an unknown unit, a part of a byte, a negative number or other values.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = Decimal(value)
    else:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ValueError("expected a size such as 4MiB, 900GiB, 1.5GB, or a number of bytes")
        if found[2] not in _UNIT_BYTES:
            raise ValueError(f"expected a size; {found[2]!r} is no unit of bytes: {nearest(found[2], _UNIT_BYTES)}")
        size = Decimal(found[1]) * _UNIT_BYTES[found[2]]
    if size != size.to_integral_value() or not 0 <= size <= _MAX_BYTES:
        raise ValueError("expected a size of whole bytes, at least 0 and within 64 bits")
    return int(size)


def check_name(value: str) -> str:
    """Accepts names that are safe as one directory: letters, digits, dot, dash, underscore.

    Raises:
        ValueError: for anything else.

    >>> check_name("llama-8b")
    'llama-8b'
    """
    if not _NAME.fullmatch(value):
        raise ValueError(
            "expected a name of 1 to 100 letters, digits, '.', '_' or '-' that starts with a letter or digit"
            " (it becomes a directory)"
        )
    return value


def check_line(value: str) -> str:
    """Accepts one line of text: not empty, no control characters.

    Raises:
        ValueError: for anything else.

    >>> check_line("runs/a b")
    'runs/a b'
    """
    found = _CONTROL.search(value)
    if found or not value.strip():
        what = f"without the control character {found.group()!a}" if found else "that is not empty"
        raise ValueError(f"expected one line of text {what}")
    return value


def check_variable(value: str) -> str:
    """Accepts names of environment variables.

    Raises:
        ValueError: for anything else.

    >>> check_variable("NCCL_DEBUG")
    'NCCL_DEBUG'
    """
    if not _VARIABLE.fullmatch(value):
        raise ValueError("expected a variable name of letters, digits and '_' that does not start with a digit")
    return value


def check_template(value: str, legal: Iterable[str]) -> str:
    """Accepts one line of text whose {fields} are all known.

    Raises:
        ValueError: for an unknown field, with the legal ones, or for braces that do not match.

    >>> check_template("runs/{name}", DIRECTORY_FIELDS)
    'runs/{name}'
    """
    check_line(value)
    known = list(legal)
    shown = ", ".join(f"{{{name}}}" for name in known)
    try:
        parts = [part for part in Formatter().parse(value) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"expected a template with the fields {shown} ({error})") from error
    for _, name, form, conversion in parts:
        if name not in known:
            hint = nearest(str(name), known) if name else ""
            raise ValueError(f"unknown template field {{{name}}}; the legal ones are {shown}; {hint}".rstrip("; "))
        if form or conversion:
            raise ValueError(f"template field {{{name}}} takes no format; the legal ones are {shown}")
    return value


def fill(template: str, **values: str) -> str:
    """Fills a checked template; other braces stay as they are, so that words of commands can be filled too.

    >>> fill("runs/{name}/{run_id}", name="tiny", run_id="r1")
    'runs/tiny/r1'
    >>> fill("awk '{print}' {run_id}", run_id="r1")
    "awk '{print}' r1"
    """
    if not values:
        return template
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda found: values[found.group()[1:-1]], template)
