"""Executes the list of one rank: forwards and backwards of an unmodified model's blocks in the order of a schedule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from meshwright.parallel.capture import Flow
from meshwright.parallel.pieces import Pieces
from meshwright.parallel.pipeline.actions import Action, Kind

__all__ = ["Pass", "States", "execute"]


class Pass:
    """One micro-batch through all blocks and back.

    Args:
        run: the model's forward; returns the loss (0-dim) and its number of items (0-dim).
        stages: block -> stage.
    """

    def __init__(self, run: Callable[[], tuple[Tensor, Tensor]], stages: Mapping[str, int]) -> None:
        self.flow = Flow(run)
        self._stages = stages
        self._pieces: Pieces | None = None
        self._homes: list[int] = []

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """Loss and items, once forward is through."""
        assert self.flow.ended, f"forward waits at {self.flow.waits}"
        loss, items = self.flow.result
        return loss, items

    def forward(self, stage: int) -> None:
        """Runs until a block of a later stage is called, or to the end after the last stage."""
        if self.flow.waits is None and not self.flow.ended:
            self.flow.resume()
        while self.flow.waits is not None and self._stages[self.flow.waits] <= stage:
            self.flow.resume()

    def seed(self, weight: Tensor) -> None:
        """Says what the loss counts, before the first backward."""
        borders = [start for _, start in self.flow.borders]
        self._pieces = Pieces(borders, self.flow.origins, self.result[0], weight)
        home = 0
        for block, _ in self.flow.borders:
            home = max(home, self._stages.get(block, 0))  # what follows a block is done with it, repeats too
            self._homes.append(home)

    def backward(self, stage: int) -> None:
        """Goes back through all pieces of this stage and of later ones that are not done."""
        assert self._pieces is not None, "backward before seed"
        while self._homes and self._homes[-1] >= stage:
            self._homes.pop()
            self._pieces.backward(len(self._homes))


class States(Protocol):
    """What holds parameters and gradients, by stage."""

    def gather(self, stage: int) -> None:
        """Starts making parameters whole."""
        ...

    def need(self, stage: int) -> None:
        """Waits until they are."""
        ...

    def free(self, stage: int) -> None:
        """Gives their memory back."""
        ...

    def reduce(self, stage: int) -> None:
        """Starts summing gradients over data ranks."""
        ...

    def prepare(self, last: bool) -> None:
        """Says whether the next backward is the last one that adds to the gradients of its stage."""
        ...


def execute(actions: Sequence[Action], passes: Sequence[Pass], states: States, turn: Callable[[], None]) -> None:
    """Runs the list of one rank.

    Args:
        actions: what to do, all forwards before the first backward.
        passes: micro-batch -> its pass.
        states: of the stages.
        turn: called once all losses are known, before the first backward; seeds the passes.
    """
    of_states = {Kind.GATHER: states.gather, Kind.FREE: states.free, Kind.REDUCE: states.reduce}
    last = {action.stage: action for action in actions if action.kind is Kind.BACKWARD}
    turned = False
    try:
        for action in actions:
            if action.microbatch is None:
                of_states[action.kind](action.stage)
                continue
            states.need(action.stage)
            if action.kind is Kind.FORWARD:
                passes[action.microbatch].forward(action.stage)
                continue
            if not turned:
                turn()
                turned = True
            states.prepare(action == last[action.stage])
            passes[action.microbatch].backward(action.stage)
    finally:
        for each in passes:
            each.flow.close()
