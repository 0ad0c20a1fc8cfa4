"""Roles that the user's patterns and the model's own plan give to modules, before any rule is asked."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from meshwright.parallel.errors import WrapError, nearest
from meshwright.parallel.tensor_plan import starred

__all__ = ["PATTERNS", "Wishes"]

PATTERNS = ("column", "row", "vocabulary", "replicate")
"""What a user's pattern may ask for."""


class Wishes:
    """Roles that the user's patterns and the model's own plan give to modules."""

    def __init__(self, model: nn.Module, patterns: Mapping[str, str]) -> None:
        self.patterns = patterns
        self._own = {pattern: _role(style) for pattern, style in _own_plan(model).items()}
        paths = [path for path, _ in model.named_modules() if path]
        for pattern, role in patterns.items():
            if role not in PATTERNS:
                raise WrapError(f"tensor_plan[{pattern!r}]={role!r} does not exist; {nearest(role, PATTERNS)}")
            if not any(fnmatchcase(path, pattern) for path in paths):
                close = nearest(pattern, [starred(path) for path in paths] if "*" in pattern else paths)
                raise WrapError(f"tensor_plan: no module of the model fits {pattern!r}; {close}")

    def of(self, path: str) -> tuple[str, str] | None:
        """Role and reason, or None where nobody asked for anything."""
        for pattern, role in self.patterns.items():
            if fnmatchcase(path, pattern):
                return role, f"your pattern {pattern!r}"
        for pattern, own in self._own.items():
            if own is not None and fnmatchcase(path, pattern):
                return own, "the model's own tp_plan"
        return None


def _own_plan(model: nn.Module) -> Mapping[str, str]:
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    return plan if isinstance(plan, Mapping) else {}


def _role(style: Any) -> str | None:
    """Our word for a style of transformers' plans; None where it says something else."""
    text = str(style)
    if "gather" in text or "embedding" in text:
        return "vocabulary"
    return "column" if "col" in text else "row" if "row" in text else "replicate" if "replicate" in text else None
