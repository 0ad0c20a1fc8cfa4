"""Errors of the parallel package: a fact with its values, where it was found, and what to do instead."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BatchError",
    "DeferError",
    "LossError",
    "MeshError",
    "MeshwrightError",
    "RankError",
    "ScheduleError",
    "WeightsError",
    "WrapError",
    "nearest",
]


class MeshwrightError(ValueError):
    """Base of every error that a user of this library can cause and mend."""


class MeshError(MeshwrightError):
    """A mesh whose degrees, axes or coordinates do not fit."""


class WrapError(MeshwrightError):
    """A model that cannot be split as asked, or an option that does not exist."""


class DeferError(WrapError):
    """A model whose constructor needs memory while it runs."""


class WeightsError(MeshwrightError):
    """Files of weights that do not fit the model."""


class BatchError(MeshwrightError):
    """A batch that cannot be split into micro-batches or does not fit the model."""


class LossError(MeshwrightError):
    """A loss that breaks the stated contract (mean over tokens, over samples, or a sum)."""


class ScheduleError(MeshwrightError):
    """A schedule that cannot be run, or a pipeline that cannot be cut as asked."""


class PlotError(MeshwrightError):
    """A picture that cannot be drawn here."""


class RankError(MeshwrightError):
    """A rank that failed; carries the traceback of the first one."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Ends an error message with the closest legal word, or with all of them.

    >>> nearest("fdsp", ["dp", "fsdp"])
    "did you mean 'fsdp'?"
    >>> nearest("x", ["dp", "fsdp"])
    'choose from: dp, fsdp'
    """
    names = list(choices)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(names)}"
