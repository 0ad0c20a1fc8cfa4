"""What a plain YAML 1.2 scalar means (core schema, section 10.3.2 of the specification).

`24:00:00`, `on`, `no` and dates are text, `017` is seventeen, `0o17` is fifteen, `1e-5` is a number.
"""

import re
from math import isfinite

__all__ = ["ScalarError", "plain_value"]

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_INTEGER = 2**63 - 1
_MAX_DIGITS = 24


class ScalarError(ValueError):
    """A number that no job can use: not finite, or an integer beyond 64 bits."""


def plain_value(text: str) -> str | int | float | bool | None:
    """Reads an unquoted scalar by YAML 1.2 rules.

    >>> [plain_value(text) for text in ("24:00:00", "on", "017", "0o17", "1e-5", "true", "~", "2026-01-02")]
    ['24:00:00', 'on', 17, 15, 1e-05, True, None, '2026-01-02']

    Raises:
        ScalarError: for .nan, .inf, 1e999 and integers beyond 64 bits.
    """
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not isfinite(number):
            raise ScalarError("expected a finite number; it is too large for a float")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ScalarError("expected a finite number")
    return text


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    digits = text.lstrip("+-").removeprefix("0o").removeprefix("0x").lstrip("0")
    number = int(text, base) if len(digits) <= _MAX_DIGITS else _MAX_INTEGER + 1
    if abs(number) > _MAX_INTEGER:
        raise ScalarError(f"expected an integer of at most 64 bits ({_MAX_INTEGER})")
    return number
