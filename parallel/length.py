"""How long a dealt sequence is, for each pass through the model."""

from contextvars import ContextVar
from typing import Any

from torch import Tensor

from meshwright.parallel.exchange import Axis

__all__ = ["Length"]


class Length:
    """The dealt sequence of one list of blocks: how long the whole one is, and how wide.

    Each pass through the model has its own, also where several take turns: passes are contexts (`contextvars`).
    """

    def __init__(self, axis: Axis, *, full: int = 0, width: int = 0) -> None:
        self.axis = axis
        self._now: ContextVar[tuple[int, int]] = ContextVar("length", default=(full, width))

    @property
    def full(self) -> int:
        """Positions of the whole sequence."""
        return self._now.get()[0]

    @property
    def width(self) -> int:
        """Features of the stream."""
        return self._now.get()[1]

    def open(self, stream: Tensor) -> None:
        """Says which stream is dealt from here on ([..., positions, features])."""
        self._now.set((stream.shape[-2], stream.shape[-1]))

    def is_share(self, tensor: Any) -> bool:
        """Whether a value is this rank's share of the stream."""
        return self._fits(tensor) and tensor.shape[-2] == self._share() and tensor.shape[-1] == self.width

    def is_whole(self, tensor: Any) -> bool:
        """Whether a value is a whole stream."""
        return self._fits(tensor) and tensor.shape[-2] == self.full and tensor.shape[-1] == self.width

    def _fits(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() == 3 and tensor.is_floating_point()

    def _share(self) -> int:
        return self.axis.dealing.size(self.full, self.axis.rank)
