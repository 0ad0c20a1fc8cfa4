"""Calls of blocks, watched: equal blocks that are called alike run once, and the others give what the first gave."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from meshwright.parallel.unit_run import settings_of

Found = TypeVar("Found")

__all__ = ["Alike", "alike_blocks", "watch_blocks"]


class Around(Protocol):
    """Told that a block begins, is skipped (None), or that one has ended, perhaps the last."""

    def __call__(self, name: str | None, inputs: list[Tensor], *, is_over: bool = False, is_last: bool = False) -> None:
        """See there."""
        ...


@dataclass
class Alike:
    """Which blocks are equal.

    Args:
        first: block -> the first one that is equal to it.
        calls: (first block, what it was called with) -> the block of which that call was run, and what it gave.
        runs: block -> the block of which the call was run.
    """

    first: dict[str, str]
    calls: dict[Any, tuple[str, Any]] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)

    def is_first(self, block: str) -> bool:
        """Whether no block before it is equal."""
        return self.first[block] == block

    def spread(self, found: Mapping[str, Found]) -> dict[str, Found]:
        """What was found of first blocks, for all."""
        return {**found, **{name: found[first] for name, first in self.first.items() if first in found}}


def alike_blocks(blocks: Mapping[str, nn.Module], apart: Iterable[str] = ()) -> Alike:
    """Compares types, settings and shapes of parameters; numbers that count the blocks themselves do not matter.

    Args:
        blocks: by name.
        apart: those that are like no other, whatever they look like.

    >>> two = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4)])
    >>> alike_blocks(dict(two.named_children())).first
    {'0': '0', '1': '0', '2': '2'}
    """
    numbers = {name: _numbers(block) for name, block in blocks.items()}
    counting = {key for key in set().union(*numbers.values()) if _counts([each.get(key) for each in numbers.values()])}
    known: dict[Any, str] = {}
    alone = set(apart)
    first = {}
    for name, block in blocks.items():
        kept = tuple((key, value) for key, value in numbers[name].items() if key not in counting)
        hooks = len(block._forward_pre_hooks), len(block._forward_hooks)
        mark = name if name in alone else None
        first[name] = known.setdefault((settings_of(block), kept, hooks, mark), name)
    return Alike(first)


def _numbers(block: nn.Module) -> dict[tuple[str, str], int | None]:
    return {
        (path, name): value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if value is None or type(value) is int
    }


def _counts(values: list[int | None]) -> bool:
    """Whether numbers go up by one from block to block, perhaps anew for a second list of blocks."""
    steps = [(one, other) for one, other in pairwise(values) if one is not None and other is not None]
    return len(steps) == len(values) - 1 and len(steps) > 0 and all(b - a == 1 or b == values[0] for a, b in steps)


@contextmanager
def watch_blocks(blocks: Mapping[str, nn.Module], alike: Alike, around: Around) -> Iterator[None]:
    """Inside, each call of a block is told of; one that is like an earlier one is skipped.

    Where equal blocks are called otherwise, the first of them runs in the place of each.
    """
    before = {name: type(block) for name, block in blocks.items()}
    left = dict.fromkeys(blocks)

    def run(name: str, args: Any, kwargs: Any) -> Any:
        first = alike.first[name]
        key = first, _shapes((args, kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        left.pop(name, None)
        ran, output = alike.calls.get(key, (name, None))
        if ran != name:
            around(None, inputs)
            made = _skip(output, inputs)
        else:
            around(name, inputs)
            made = before[first].__call__(blocks[first], *args, **kwargs)
            alike.calls[key] = name, _likes(made)
        alike.runs[name] = ran
        around(name, [], is_over=True, is_last=not left)
        return made

    try:
        for name, block in blocks.items():
            block.__class__ = _watched(before[name], name, run)
        yield
    finally:
        for name, block in blocks.items():
            block.__class__ = before[name]


def _watched(kind: type[nn.Module], name: str, run: Any) -> Any:
    def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(name, args, kwargs)

    told = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), told)


def _shapes(arguments: Any) -> Any:
    return tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in tree_leaves(arguments)
        if isinstance(leaf, (Tensor, bool, int, float, str))
    )


@dataclass(frozen=True)
class _Like:
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


def _likes(made: Any) -> Any:
    leaves, spec = tree_flatten(made)
    return [
        _Like(leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ], spec


def _skip(output: Any, inputs: list[Tensor]) -> Any:
    """Tensors like those that the first of equal blocks gave; gradients go back from them to what this one is given."""
    leaves, spec = output
    likes = [each for each in leaves if isinstance(each, _Like)]
    made = _Skip.apply(likes, *inputs)  # type: ignore[no-untyped-call]
    tensors = iter(each if like.requires_grad else each.detach() for each, like in zip(made, likes, strict=True))
    return tree_unflatten([next(tensors) if isinstance(each, _Like) else each for each in leaves], spec)


class _Skip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, likes: list[_Like], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.likes = [(each.shape, each.dtype, each.requires_grad and each.is_floating_point()) for each in inputs]
        device = inputs[0].device if inputs else torch.device("cpu")
        return tuple(torch.empty(each.shape, dtype=each.dtype, device=device) for each in likes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        device = gradients[0].device
        return None, *(
            torch.empty(shape, dtype=dtype, device=device) if wanted else None for shape, dtype, wanted in ctx.likes
        )
