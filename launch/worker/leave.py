"""Leaving early: a queue that will take the nodes away says so by a signal, and the training saves and goes.

Any rank may have been told; all decide together, between two steps.
"""

import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType

__all__ = ["LEFT", "Leave"]

LEFT = 75
"""Exit code of a rank that saved and left."""


class Leave:
    """Whether this training is to save and leave; False and free of cost where nothing warns.

    Args:
        environment: MESHWRIGHT_SAVE_SIGNAL names the signal, as a start plan says.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._name = environment.get("MESHWRIGHT_SAVE_SIGNAL", "")
        self._told = False
        self.decided = False
        if self._name:
            signal.signal(signal.Signals[f"SIG{self._name}"], self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._told = True

    def __call__(self, agree: Callable[[int], list[int]]) -> bool:
        """Asks all ranks, by what gathers one integer of each; to be called by all of them."""
        if self._name and not self.decided:
            self.decided = any(agree(int(self._told)))
        return self.decided
