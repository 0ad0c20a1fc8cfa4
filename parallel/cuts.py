"""Where the graph of one forward pass is cut: pieces that begin with a stage, leaves in the place of earlier values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Cuts", "fresh"]


@dataclass(eq=False)
class _Cut:
    """A value, the leaf that goes on in its place, and the leaf's value as it is handed on."""

    value: Tensor
    leaf: Tensor
    fresh: Tensor
    version: int


class Cuts:
    """The cuts of one pass.

    Args:
        stage: what comes before the first border belongs to it.

    Attributes:
        stage: of the piece that is made now.
        borders: (stage, sequence number) where each piece of the autograd graph begins. A node belongs to the last
            piece that began at or before its number.
        origins: leaf made at a border -> the edge of the graph that it continues.

    >>> cuts, weight = Cuts(0), torch.ones(2, requires_grad=True)
    >>> cuts.begin(0)
    >>> value = weight * 2
    >>> cuts.begin(1)
    >>> (leaf,) = cuts.cut((value,), {})[0]
    >>> leaf.sum().backward()  # goes no further than to the border
    >>> weight.grad is None, [stage for stage, _ in cuts.borders]
    (True, [0, 1])
    """

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.borders: list[tuple[int, int]] = []
        self.origins: Any = WeakTensorKeyDictionary()
        self._given: list[_Cut] = []

    @property
    def leaves(self) -> dict[int, Tensor]:
        """id of what the last border handed on -> its leaf."""
        return {id(each.fresh): each.leaf for each in self._given}

    def begin(self, stage: int) -> None:
        """Begins a piece."""
        self.stage = stage
        self.borders.append((stage, torch._C._autograd._get_sequence_nr()))

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments, tensors of earlier pieces as new leaves.

        In lists and dicts they stay, since blocks may add to them; the graph tells what comes from there.
        """
        self._given = []
        return tuple(self._cut(each) for each in args), {key: self._cut(each) for key, each in kwargs.items()}

    def rebase(self) -> None:
        """Where what a stage was given has been changed, others who hold it go on with the change's history."""
        for each in self._given:
            if each.fresh._version != each.version:
                _Rebased.apply(each.value, each.fresh)  # type: ignore[no-untyped-call]
                each.version = each.fresh._version

    def end(self) -> None:
        """Lets go of values."""
        self._given = []

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._cut_tensor(value)
        if value is None or isinstance(value, (list, dict, bool, int, str)):
            return value
        return tree_map(self._cut_tensor, value, is_leaf=lambda each: isinstance(each, (list, dict)))

    def _cut_tensor(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.grad_fn is None or not torch.is_grad_enabled():
            return value
        if value.grad_fn._sequence_nr() >= self.borders[-1][1]:
            return value
        for each in self._given:
            if each.value is value:
                return each.fresh
        leaf = value.detach().requires_grad_()
        self.origins[leaf] = get_gradient_edge(value)
        made = fresh(leaf)
        self._given.append(_Cut(value, leaf, made, made._version))
        return made


def fresh(leaf: Tensor) -> Tensor:
    """A leaf's value as a tensor that may be changed in place; its gradient goes to the leaf."""
    return torch.ops.aten._unsafe_view.default(leaf, leaf.shape)  # type: ignore[no-any-return]


class _Rebased(Function):
    """A value whose memory was changed elsewhere takes over the history of that change."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.mark_dirty(inputs[0])
        return inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        del ctx
        return None, gradients[0]
