"""The base of every block of a job, and the types its keys have.

YAML types are not coerced: "2" is no integer, true is no integer, 2 is a number. Units become seconds and bytes.
"""

from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from meshwright.launch.values import (
    DIRECTORY_FIELDS,
    PREFIX_FIELDS,
    check_line,
    check_name,
    check_template,
    check_variable,
    format_duration,
    parse_duration,
    parse_size,
)

__all__ = [
    "BY_KIND",
    "DURATION_PATTERN",
    "Block",
    "Count",
    "Directory",
    "Duration",
    "Line",
    "Listed",
    "Name",
    "Prefix",
    "Share",
    "Size",
    "Variable",
    "kind_of",
    "whole",
]

Value = TypeVar("Value")


class Block(BaseModel):
    """A frozen mapping with known keys only."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
        hide_input_in_errors=True,
    )


def kind_of(value: object) -> str | None:
    """Which form of a key that takes several was written: the tag of a union.

    >>> kind_of(2), kind_of("auto"), kind_of([1])
    ('<integer>', '<text>', '<list>')
    """
    if isinstance(value, (dict, BaseModel)):
        return "<mapping>"
    if isinstance(value, (list, tuple)):
        return "<list>"
    if isinstance(value, str):
        return "<text>"
    return "<integer>" if isinstance(value, int) and not isinstance(value, bool) else None


BY_KIND = Discriminator(kind_of)
"""Chooses the alternative of a union by what was written, so that errors speak of that alternative only."""


def whole(value: object) -> object:
    """Refuses true and 1.0 where a few integers are legal, because Python calls them equal to 1.

    >>> whole(3)
    3
    """
    if type(value) is not int:
        raise PydanticCustomError("int_type", "expected an integer")
    return value


def _directory(value: str) -> str:
    return check_template(value, DIRECTORY_FIELDS)


def _prefix(value: str) -> str:
    return check_template(value, PREFIX_FIELDS)


DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
"""Seconds; written "90s", "10m", "24h"."""

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "pattern": "^[0-9]+(\\.[0-9]+)? ?([KMGT]i?)?B$", "minimum": 0}),
]
"""Bytes; written "4MiB", "900GiB", or as an integer."""

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""An integer of at least 1."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""

Line = Annotated[str, AfterValidator(check_line)]
"""One line of text without control characters."""

Name = Annotated[str, AfterValidator(check_name)]
"""A name that is safe as a directory."""

Variable = Annotated[str, AfterValidator(check_variable)]
"""Name of an environment variable."""

Directory = Annotated[str, AfterValidator(_directory)]
"""A path that may contain {name} and {run_id}."""

Prefix = Annotated[str, AfterValidator(_prefix)]
"""A log prefix that may contain {host} and {rank}."""

Listed = Annotated[tuple[Value, ...], Field(strict=False)]
"""A list, kept as a tuple."""
