"""How a micro-batch goes through a pipeline: which blocks are called, what they give, what travels between ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.absent import Absent
from meshwright.parallel.errors import WrapError
from meshwright.parallel.guide import Arguments

__all__ = ["Border", "Call", "Route", "Shape", "Step", "inputs_of", "instead", "replaced", "shapes_in"]

_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


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

    def absent(self, device: torch.device) -> Callable[[], Absent]:
        """What makes tensors like it whose values are elsewhere."""
        return Absent.making(self.shape, self.dtype, device)

    def empty(self, device: torch.device) -> Tensor:
        """Memory for one like it."""
        return torch.empty_strided(self.shape, self._stride, dtype=self.dtype, device=device)

    @cached_property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.shape.numel() * self.dtype.itemsize

    @cached_property
    def _stride(self) -> tuple[int, ...]:
        """Of a tensor that lies in one piece; made without asking for it takes three times as long."""
        return torch.empty(self.shape, device="meta").stride()


@dataclass(frozen=True)
class Call:
    """A block's call: whose it is, and what it gives, with a `Shape` for each tensor.

    `lacks` tells whether it takes what other ranks made, where it runs.
    """

    block: str
    stage: int
    output: Any
    lacks: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A block's call on one rank: `instead` makes what it gives where another rank has it, and is None otherwise."""

    block: str
    output: Any
    lacks: bool
    instead: Callable[[], Any] | None


@dataclass(frozen=True)
class Border:
    """What travels into a stage that follows one of another rank: places among its first block's inputs, and shapes."""

    places: tuple[int, ...]
    shapes: tuple[Shape, ...]

    @cached_property
    def returned(self) -> tuple[Shape, ...]:
        """Those whose gradients travel back."""
        return tuple(each for each in self.shapes if each.requires_grad)

    @cached_property
    def num_bytes(self) -> int:
        """Of what travels there."""
        return sum(each.num_bytes for each in self.shapes)

    @cached_property
    def num_bytes_returned(self) -> int:
        """Of the gradients."""
        return sum(each.num_bytes for each in self.returned)


@dataclass
class Route:
    """How micro-batches of one shape go through the pipeline: calls in order, and borders by the stage behind them."""

    calls: list[Call] = field(default_factory=list)
    borders: dict[int, Border] = field(default_factory=dict)
    _steps: dict[Any, tuple[Step, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def steps(self, mine: Sequence[int], device: torch.device) -> tuple[Step, ...]:
        """The calls as the rank of the stages `mine` takes them; of a route that is whole, since it remembers them."""
        key = (*mine, device)
        if key not in self._steps:
            self._steps[key] = tuple(
                Step(each.block, each.output, each.lacks, None if each.stage in mine else instead(each.output, device))
                for each in self.calls
            )
        return self._steps[key]


def instead(output: Any, device: torch.device) -> Callable[[], Any]:
    """What makes a block's output without values."""
    if isinstance(output, Shape):
        return output.absent(device)
    makers = {each: each.absent(device) for each in tree_leaves(output) if isinstance(each, Shape)}
    return lambda: tree_map(lambda each: makers[each]() if isinstance(each, Shape) else each, output)


def inputs_of(arguments: Arguments) -> list[Any]:
    """Leaves of a block's arguments in order; lists and dicts inside stay whole, since blocks may add to them."""
    args, kwargs = arguments
    leaves: list[Any] = []
    for each in (*args, *kwargs.values()):
        if each is None or isinstance(each, (Tensor, list, dict, bool)):  # a leaf already
            leaves.append(each)
        else:
            leaves += tree_leaves(each, is_leaf=_is_kept)
    return leaves


def replaced(arguments: Arguments, change: Callable[[Any], Any]) -> Arguments:
    """The same arguments with changed leaves."""
    args, kwargs = arguments

    def changed(each: Any) -> Any:
        return change(each) if isinstance(each, Tensor) else tree_map(change, each, is_leaf=_is_kept)

    return tuple(map(changed, args)), {name: changed(each) for name, each in kwargs.items()}


def shapes_in(output: Any, block: str) -> Any:
    """What a block gave, with a `Shape` for each tensor.

    Raises:
        WrapError: for an object that may hold tensors which nobody sees.
    """

    if isinstance(output, Tensor):  # the usual case, without walking through a structure
        return Shape.of(output)

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
