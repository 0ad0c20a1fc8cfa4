"""One micro-batch through the stages of one rank and back.

Every rank of a pipeline runs the model's own forward. Blocks of other ranks are skipped: what they would give is
`Absent`, except for the inputs of a rank's own blocks, which are received as leaves and whose gradients are sent back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from meshwright.parallel.absent import Absent
from meshwright.parallel.capture import Flow
from meshwright.parallel.cuts import fresh
from meshwright.parallel.errors import WrapError
from meshwright.parallel.guide import Arguments, Backward
from meshwright.parallel.pipeline.route import Border, Route, Shape, Step, inputs_of, replaced, shapes_in
from meshwright.parallel.pipeline.way_back import WayBack
from meshwright.parallel.recompute import Frame

__all__ = ["Pass", "Passes"]

_AT_ONCE = Backward()


class Pass:
    """One micro-batch on one rank.

    Args:
        run: the model's forward; returns the loss (0-dim) and its number of items (0-dim).
        stages: block -> stage.
        mine: stages of this rank, ascending; None where it has all.
        route: needed where it has not.
        device: of the values.
        backward: how it will go back.

    Attributes:
        back: the way back, once `seed` was called.
        lacks: whether the call that came last takes what other ranks made.
    """

    back: WayBack
    lacks = False

    def __init__(
        self,
        run: Callable[[], tuple[Tensor, Tensor]],
        stages: Mapping[str, int],
        *,
        mine: Sequence[int] | None = None,
        route: Route | None = None,
        device: torch.device | None = None,
        backward: Backward = _AT_ONCE,
    ) -> None:
        self.stages = stages
        self._mine = sorted(set(stages.values())) if mine is None else mine
        self.flow = Flow(run, self, backward)
        self._route = route
        self._device = device or torch.device("cpu")
        self._steps: Iterator[Step] | None = None
        self._expected: Any = None
        self._taken: dict[int, list[Tensor]] = {}
        self._unused: list[Tensor] = []
        self._sent: dict[int, list[Tensor]] = {}

    @property
    def first_stage(self) -> int:
        """The first of this rank's."""
        return self._mine[0]

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """Loss and items, once forward is through; only the rank of the last stage has them."""
        assert self.flow.ended, f"forward waits at {self.flow.waits}"
        loss, items = self.flow.result
        if isinstance(loss, Absent):
            raise WrapError(
                "the loss is made from values of other ranks of the pipeline besides what the last block gives "
                "(skips past blocks, values collected on the side); wrap this model without pp"
            )
        return loss, items

    def take(self, border: Border, stage: int, values: Sequence[Tensor]) -> None:
        """Hands over what was received for a stage."""
        shapes = border.shapes
        grad = torch.is_grad_enabled()
        self._taken[stage] = [
            each.requires_grad_(shape.requires_grad and grad) for each, shape in zip(values, shapes, strict=True)
        ]
        self._unused = list(self._taken[stage])

    def forward(self, stage: int) -> None:
        """Runs until a block of a later stage is called, or to the end after the last stage."""
        if self._route is not None and self._steps is None:
            self._steps = iter(self._route.steps(self._mine, self._device))
        last = self._route is not None and stage == self._mine[-1]
        if not self.flow.ended and (self.flow.waits is None or self.stages[self.flow.waits] <= stage):
            self.flow.resume(stage, last=last)
        if self._route is not None:
            self._keep_sent(stage + 1)
            if last:
                self.flow.close()

    def outgoing(self, stage: int) -> list[Tensor]:
        """What the next stage, on another rank, goes on with."""
        return self._sent[stage + 1]

    def seed(self, weight: Tensor | None) -> None:
        """Before the first backward: says what the loss counts (None where it is another rank's)."""
        loss = [] if weight is None else [self.result[0]]
        ends = [*loss, *(each for sent in self._sent.values() for each in sent)]
        received = [leaf for leaves in self._taken.values() for leaf in leaves]
        self.back = WayBack(self.flow, ends, received=received)
        if weight is not None and loss[0].requires_grad:
            self.back.give(loss[0], weight)

    def give(self, stage: int, gradients: Sequence[Tensor]) -> None:
        """Hands over what the next stage, on another rank, sent back."""
        assert self._route is not None, "one rank has all stages"
        shapes = self._route.borders[stage + 1].shapes
        sent = [each for each, shape in zip(self._sent.pop(stage + 1), shapes, strict=True) if shape.requires_grad]
        for value, gradient in zip(sent, gradients, strict=True):
            self.back.give(value, gradient)

    def returned(self, stage: int) -> list[Tensor]:
        """Gradients of what was received for a stage."""
        leaves = [each for each in self._taken.pop(stage) if each.requires_grad]
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in leaves]

    def frames(self, stage: int, *, beyond: bool = False) -> list[Frame]:
        """Calls of a stage's blocks that are recomputed; `beyond`, of all stages."""
        if beyond:
            return [frame for frames in self.flow.frames.values() for frame in frames]
        return self.flow.frames.get(stage, [])

    def skips(self, block: str) -> Callable[[], Any] | None:
        """What a block of another rank gives: tensors without values.

        Raises:
            WrapError: when the route says that another one is called here.
        """
        if self._steps is None:
            return None
        step = next(self._steps, None)
        if step is None or step.block != block:
            raise WrapError(
                f"block {block} is called where {step.block if step else 'the end'} was before; ranks of a pipeline "
                "must call the same blocks for every micro-batch of one shape (is there layer drop?)"
            )
        self._expected = step.output
        self.lacks = step.lacks
        return step.instead

    def gave(self, block: str, output: Any) -> None:
        """Checks what an own block gave: single tensors at once, since every block comes by here.

        Raises:
            WrapError: when it is not what it gave before.
        """
        if self._steps is None:
            return
        expected = self._expected
        if (
            isinstance(output, Tensor)
            and isinstance(expected, Shape)
            and output.shape == expected.shape
            and output.dtype is expected.dtype
            and output.requires_grad is expected.requires_grad
        ):
            return
        given = shapes_in(output, block)
        if given != expected:
            frozen = _with_gradients(given) == _with_gradients(expected)
            raise WrapError(
                f"block {block} gave {given}, where it gave {expected} for the first micro-batch of this shape; ranks "
                "of a pipeline that skip it rely on that"
                + (" (what is frozen up to this block, say before the model is wrapped)" if frozen else "")
            )

    def present(self, value: Any) -> Tensor:
        """The values behind one of the inputs of the block that waits.

        Raises:
            WrapError: when another rank has them.
        """
        found: Any = value.value if isinstance(value, Absent) else value
        if not isinstance(found, Tensor):
            raise WrapError(
                f"block {self.flow.waits} takes a value that the rank before it in the pipeline does not hold; "
                "values travel from stage to stage through blocks' inputs only"
            )
        return found

    def completed(self, block: str, arguments: Arguments) -> Arguments:
        """The inputs of an own block, with received values where this rank has none.

        Raises:
            WrapError: when one was not received.
        """
        if self._route is None:
            return arguments

        def change(value: Any) -> Any:
            if not isinstance(value, Absent):
                return value
            if value.value is None:
                if not self._unused:
                    raise WrapError(
                        f"block {block} takes a value of shape {tuple(value.shape)} that another rank of the pipeline "
                        "made and that the first block of this rank's stage does not take; move the cut, or wrap this "
                        "model without pp"
                    )
                leaf = self._unused.pop(0)
                value.value = fresh(leaf) if leaf.requires_grad else leaf
            return value.value

        return replaced(arguments, change)

    def _keep_sent(self, stage: int) -> None:
        """Notes what the stage behind a border goes on with."""
        assert self._route is not None, stage
        border = self._route.borders.get(stage)
        if border is None or stage - 1 not in self._mine:
            return
        leaves = inputs_of(self.flow.arguments)
        self._sent[stage] = [self.present(leaves[place]) for place in border.places]


def _with_gradients(shapes: Any) -> Any:
    return tree_map(lambda each: replace(each, requires_grad=True) if isinstance(each, Shape) else each, shapes)


class Passes(Sequence[Pass]):
    """The passes of a step: each is made when it is asked for, or all of them while a rank waits anyway.

    Args:
        make: of one micro-batch.
        number: of micro-batches.
    """

    def __init__(self, make: Callable[[int], Pass], number: int) -> None:
        self._make = make
        self._made: list[Pass | None] = [None] * number
        self._wanting = True

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        """One pass."""
        made = self._made[index]
        if made is None:
            made = self._made[index] = self._make(index)
        return made

    def make(self) -> None:
        """Makes all."""
        if self._wanting:
            self._wanting = False
            for index in range(len(self)):
                self[index]

    def close(self) -> None:
        """Ends those that have begun."""
        for each in self._made:
            if each is not None:
                each.flow.close()
