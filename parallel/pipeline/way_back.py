"""Going back through one micro-batch, a stage at a time."""

from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from meshwright.parallel.capture import Flow
from meshwright.parallel.pieces import Pieces

__all__ = ["WayBack"]


class WayBack:
    """The pieces of a forward pass by the stage with which they go back.

    Args:
        flow: the pass, as far as this rank needs it.
        ends: values whose gradients will be given.
        received: leaves whose gradients go to other ranks.
    """

    def __init__(self, flow: Flow, ends: Sequence[Tensor], *, received: Sequence[Tensor] = ()) -> None:
        cuts = flow.cuts
        starts = [start for _, start in cuts.borders]
        self._pieces = Pieces(starts, cuts.origin, ends, received=received, hooked=cuts.hooked)
        self._homes = [stage for stage, _ in flow.cuts.borders]
        self._late: dict[int, list[int]] = {}

    def give(self, value: Tensor, gradient: Tensor) -> None:
        """Adds to the gradient of one of the ends."""
        self._pieces.give(value, gradient)

    def whole(self, stage: int) -> None:
        """Goes back through all pieces of this stage and of later ones that are not done."""
        for piece in self._left(stage):
            self._pieces.backward(piece)

    def inputs(self, stage: int) -> None:
        """The first half of that: what earlier stages wait for."""
        self._late[stage] = self._left(stage)
        for piece in self._late[stage]:
            self._pieces.backward_inputs(piece)

    def weights(self, stage: int) -> None:
        """The second half."""
        for piece in self._late.pop(stage):
            self._pieces.backward_weights(piece)

    def goes_beyond(self, stage: int) -> bool:
        """Whether going back through a stage comes by what earlier stages keep."""
        first = bisect_left(self._homes, stage)
        return any(self._pieces.goes_beyond(piece) for piece in range(first, len(self._homes)))

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return not self._homes and not self._late

    def _left(self, stage: int) -> list[int]:
        """Takes the pieces that are not done, the last first."""
        first = bisect_left(self._homes, stage)  # homes ascend
        taken = list(range(first, len(self._homes)))
        del self._homes[first:]
        return taken[::-1]
