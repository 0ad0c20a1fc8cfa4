"""Who decides what happens at the calls of blocks, and how a pass goes back."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Arguments", "Backward", "Guide"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block's call."""


@dataclass(frozen=True)
class Backward:
    """How a pass will go back.

    Args:
        recomputed: names of blocks of which only the inputs are kept.
        halves: whether the gradients of inputs come first and those of weights later.
    """

    recomputed: Container[str] = ()
    halves: bool = False


class Guide(Protocol):
    """Who decides what happens at the calls of blocks."""

    @property
    def stages(self) -> Mapping[str, int]:
        """Block -> stage."""
        ...

    @property
    def first_stage(self) -> int:
        """The stage to which what comes before all blocks is counted."""
        ...

    @property
    def lacks(self) -> bool:
        """Whether the call that was asked about last takes what others made."""
        ...

    def skips(self, block: str) -> Callable[[], Any] | None:
        """What makes the output of a call that is left out; None where the block runs."""
        ...

    def completed(self, block: str, arguments: Arguments) -> Arguments:
        """What a block takes, in the place of what the model gave it, where it `lacks` something."""
        ...

    def gave(self, block: str, output: Any) -> None:
        """Told what a block gave."""
        ...
