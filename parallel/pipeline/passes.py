"""One micro-batch through the stages of one rank and back.

Every rank of a pipeline runs the model's own forward. Blocks of other ranks are skipped: what they would give is
`Absent`, except for the inputs of a rank's own blocks, which are received as leaves and whose gradients are sent back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.absent import Absent
from meshwright.parallel.capture import Flow, fresh
from meshwright.parallel.errors import WrapError
from meshwright.parallel.pieces import Pieces

__all__ = ["Border", "Call", "Pass", "Route", "Shape", "inputs_of", "replaced", "shapes_in"]

_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Shape":
        """The shape of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.requires_grad)

    def absent(self, device: torch.device) -> Absent:
        """A tensor like it whose values are elsewhere."""
        return Absent.of(self.shape, self.dtype, device)

    def empty(self, device: torch.device) -> Tensor:
        """Memory for one like it."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Call:
    """A block's call: whose it is, and what it gives, with a `Shape` for each tensor."""

    block: str
    stage: int
    output: Any


@dataclass(frozen=True)
class Border:
    """What travels into a stage that follows one of another rank: places among its first block's inputs, and shapes."""

    places: tuple[int, ...]
    shapes: tuple[Shape, ...]

    @property
    def returned(self) -> tuple[Shape, ...]:
        """Those whose gradients travel back."""
        return tuple(each for each in self.shapes if each.requires_grad)


@dataclass
class Route:
    """How micro-batches of one shape go through the pipeline: calls in order, and borders by the stage behind them."""

    calls: list[Call] = field(default_factory=list)
    borders: dict[int, Border] = field(default_factory=dict)


class Pass:
    """One micro-batch on one rank.

    Args:
        run: the model's forward; returns the loss (0-dim) and its number of items (0-dim).
        stages: block -> stage.
        mine: stages of this rank; None where it has all.
        route: needed where it has not.
        device: of the values.
    """

    def __init__(
        self,
        run: Callable[[], tuple[Tensor, Tensor]],
        stages: Mapping[str, int],
        mine: Sequence[int] | None = None,
        route: Route | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.flow = Flow(run)
        self._stages = stages
        self._mine = sorted(set(stages.values())) if mine is None else sorted(mine)
        self._route = route
        self._device = device or torch.device("cpu")
        self._calls = 0
        self._taken: dict[int, list[Tensor]] = {}
        self._unused: list[Tensor] = []
        self._sent: dict[int, list[Tensor]] = {}
        self._pieces: Pieces | None = None
        self._homes: list[int] = []

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
        if self.flow.waits is None and not self.flow.ended:
            self.flow.resume()
        while self.flow.waits is not None and self._stages[self.flow.waits] <= stage:
            self.through()
        if self._route is not None:
            self._keep_sent(stage + 1)
            if stage == self._mine[-1]:
                self.flow.close()

    def outgoing(self, stage: int) -> list[Tensor]:
        """What the next stage, on another rank, goes on with."""
        return self._sent[stage + 1]

    def seed(self, weight: Tensor | None) -> None:
        """Before the first backward: says what the loss counts (None where it is another rank's)."""
        borders = [start for _, start in self.flow.borders]
        loss = [] if weight is None else [self.result[0]]
        self._pieces = Pieces(
            borders, self.flow.origins, [*loss, *(each for sent in self._sent.values() for each in sent)]
        )
        if weight is not None and loss[0].requires_grad:
            self._pieces.give(loss[0], weight)
        self._homes = list(self._homes_of_pieces())

    def give(self, stage: int, gradients: Sequence[Tensor]) -> None:
        """Hands over what the next stage, on another rank, sent back."""
        assert self._pieces is not None, "gradients before seed"
        assert self._route is not None, "one rank has all stages"
        shapes = self._route.borders[stage + 1].shapes
        sent = [each for each, shape in zip(self._sent.pop(stage + 1), shapes, strict=True) if shape.requires_grad]
        for value, gradient in zip(sent, gradients, strict=True):
            self._pieces.give(value, gradient)

    def backward(self, stage: int) -> None:
        """Goes back through all pieces of this stage and of later ones that are not done."""
        assert self._pieces is not None, "backward before seed"
        while self._homes and self._homes[-1] >= stage:
            self._homes.pop()
            self._pieces.backward(len(self._homes))

    def returned(self, stage: int) -> list[Tensor]:
        """Gradients of what was received for a stage."""
        leaves = [each for each in self._taken.pop(stage) if each.requires_grad]
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in leaves]

    def lacking(self) -> list[int]:
        """Places among the inputs of the block that waits whose values this rank has not, each value once."""
        lacked: list[Tensor] = []
        places = []
        for place, value in enumerate(inputs_of(self.flow.arguments)):
            if isinstance(value, Absent) and value.value is None and all(value is not each for each in lacked):
                lacked.append(value)
                places.append(place)
        return places

    def through(self) -> None:
        """Through the call that waits: run if it is this rank's, else skipped."""
        call = self._expected()
        if call is None:
            self.run()
        elif call.stage in self._mine:
            self.run()
            given = shapes_in(self.flow.output, call.block)
            if given != call.output:
                raise WrapError(
                    f"block {call.block} gave {given}, where it gave {call.output} for the first micro-batch of this "
                    "shape; ranks of a pipeline that skip it rely on that"
                )
        else:
            output = tree_map(lambda each: each.absent(self._device) if isinstance(each, Shape) else each, call.output)
            self.flow.skip(output)

    def count(self) -> None:
        """Says that a call was gone through by `run`."""
        self._calls += 1

    def run(self) -> None:
        """Runs the block that waits, and the model's code up to the next one."""
        self.flow.arguments = self._completed()
        self.flow.resume()

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

    def _expected(self) -> Call | None:
        """What the route says of the call that waits."""
        if self._route is None:
            return None
        call = self._route.calls[self._calls] if self._calls < len(self._route.calls) else None
        self._calls += 1
        if call is None or call.block != self.flow.waits:
            raise WrapError(
                f"block {self.flow.waits} is called where {call.block if call else 'the end'} was before; ranks of a "
                "pipeline must call the same blocks for every micro-batch of one shape (is there layer drop?)"
            )
        return call

    def _completed(self) -> Arguments:
        """The inputs of an own block, with received values where this rank has none."""
        if self._route is None:
            return self.flow.arguments
        if not any(isinstance(each, Absent) for each in inputs_of(self.flow.arguments)):
            return self.flow.arguments

        def change(value: Any) -> Any:
            if not isinstance(value, Absent):
                return value
            if value.value is None:
                if not self._unused:
                    raise WrapError(
                        f"block {self.flow.waits} takes a value of shape {tuple(value.shape)} that another rank of the "
                        "pipeline made and that the first block of this rank's stage does not take; move the cut, or "
                        "wrap this model without pp"
                    )
                leaf = self._unused.pop(0)
                value.value = fresh(leaf) if leaf.requires_grad else leaf
            return value.value

        return replaced(self.flow.arguments, change)

    def _keep_sent(self, stage: int) -> None:
        """Notes what the stage behind a border goes on with."""
        assert self._route is not None, stage
        border = self._route.borders.get(stage)
        if border is None or stage - 1 not in self._mine:
            return
        leaves = inputs_of(self.flow.arguments)
        self._sent[stage] = [self.present(leaves[place]) for place in border.places]

    def _homes_of_pieces(self) -> Iterator[int]:
        """Stage with which each piece goes back.

        What follows an own block is done with it, repeats too; what follows another's, with the next own one.
        """
        home = self._mine[0]
        for block, _ in self.flow.borders:
            stage = self._stages.get(block, home)
            home = max(home, next((own for own in self._mine if own >= stage), self._mine[-1]))
            yield home


def inputs_of(arguments: Arguments) -> list[Any]:
    """Leaves of a block's arguments in order; lists and dicts inside stay whole, since blocks may add to them."""
    args, kwargs = arguments
    return [leaf for each in (*args, *kwargs.values()) for leaf in tree_leaves(each, is_leaf=_is_kept)]


def replaced(arguments: Arguments, change: Callable[[Any], Any]) -> Arguments:
    """The same arguments with changed leaves."""
    args, kwargs = arguments
    changed = tuple(tree_map(change, each, is_leaf=_is_kept) for each in args)
    return changed, {name: tree_map(change, each, is_leaf=_is_kept) for name, each in kwargs.items()}


def shapes_in(output: Any, block: str) -> Any:
    """What a block gave, with a `Shape` for each tensor.

    Raises:
        WrapError: for an object that may hold tensors which nobody sees.
    """

    def shape(each: Any) -> Any:
        if isinstance(each, Tensor):
            return Shape.of(each)
        if each is None or isinstance(each, _PLAIN):
            return each
        raise WrapError(
            f"block {block} gives an object of type {type(each).__name__}, of which other ranks of a pipeline would "
            "have a copy that grows old; let it give tensors in tuples, lists, dicts or named tuples (use_cache=False "
            "for a cache)"
        )

    return tree_map(shape, output)


def _is_kept(value: Any) -> bool:
    return isinstance(value, (list, dict))
