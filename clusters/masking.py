"""Secrets, taken out of what is shown."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Mask"]

_MASK = "***"


class Mask:
    """Replaces secrets in what is shown.

    Args:
        values: the secrets; of several lines, each line is one.

    >>> Mask(["hunter22"])("password=hunter22")
    'password=***'
    """

    def __init__(self, values: Iterable[str]) -> None:
        parts = {line.strip() for value in values for line in value.splitlines()} - {""}
        words = sorted(parts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        return self._pattern.sub(_MASK, text) if self._pattern else text

    def inside(self, value: Any) -> Any:
        """JSON-able values without secrets, whatever their text would look like in JSON.

        >>> Mask(['say "x"']).inside({"why": ['say "x"!', 3]})
        {'why': ['***!', 3]}
        """
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self(key): self.inside(each) for key, each in value.items()}
        return [self.inside(each) for each in value] if isinstance(value, list | tuple) else value
