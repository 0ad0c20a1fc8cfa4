"""What is noted when a pass comes by a block, whether the block runs on this rank or is skipped.

A rank of a pipeline skips blocks of others with their hooks; what later blocks need to know from there is noted here.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["note_passing", "on_passing"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Note = Callable[[Arguments], None]
_ATTRIBUTE = "_meshwright_passing"


def on_passing(block: nn.Module, note: Note) -> None:
    """Has `note` called with the arguments of every call of a block.

    >>> block, seen = nn.Identity(), []
    >>> on_passing(block, seen.append)
    >>> note_passing(block, ((1,), {}))
    >>> seen
    [((1,), {})]
    """
    block.__dict__.setdefault(_ATTRIBUTE, []).append(note)


def note_passing(block: nn.Module, arguments: Arguments) -> None:
    """Calls what `on_passing` was given for a block."""
    for note in block.__dict__.get(_ATTRIBUTE, ()):
        note(arguments)
