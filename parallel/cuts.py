"""Where the graph of one forward pass is cut: pieces that begin with a stage, leaves in the place of earlier values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from meshwright.parallel.errors import WrapError

__all__ = ["Cuts", "fresh", "is_cut"]

_MARK = "_meshwright_cut"
_AS_IT_IS: Any = torch.ops.aten._unsafe_view.default


@dataclass(eq=False)
class _Cut:
    """What is handed on, and the values that it stands for: the stage's own input, and what that stood for before."""

    fresh: TensorWeakRef
    version: int
    values: dict[TensorWeakRef, int]

    def alive(self) -> list[tuple[TensorWeakRef, Tensor]]:
        """Values that somebody holds."""
        return [(each, value) for each in self.values if (value := each()) is not None]


class Cuts:
    """The cuts of one pass.

    Args:
        stage: what comes before the first border belongs to it.

    Attributes:
        stage: of the piece that is made now.
        opening: whether the first block begins a piece too. Where halves of a backward are told apart, the first one
            goes back to what that block takes, or it would have nothing to do in the first stage.
        borders: (stage, sequence number) where each piece of the autograd graph begins. A node belongs to the last
            piece that began at or before its number.
        leaves: id of what the last border handed on -> its leaf, until its block is through.
        hooked: nodes whose tensors got hooks.
        given: what borders handed on, as far as somebody may still look at it: there is something to `check` and
            to `rebase` only where there is any.

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
        self.opening = False
        self.borders: list[tuple[int, int]] = []
        self._origins: Any = None  # leaf made at a border -> the edge of the graph that it continues
        self.leaves: dict[int, Tensor] = {}
        self.hooked: set[Any] = set()
        self.given: list[_Cut] = []
        self._new: list[tuple[Tensor, Tensor]] = []

    def begin(self, stage: int) -> None:
        """Begins a piece."""
        self.stage, self.opening = stage, False
        self.borders.append((stage, torch._C._autograd._get_sequence_nr()))

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments, tensors of earlier pieces as new leaves.

        In lists and dicts they stay, since blocks may add to them; the graph tells what comes from there.
        """
        self._new, self.leaves = [], {}
        return tuple(self._cut(each) for each in args), {key: self._cut(each) for key, each in kwargs.items()}

    def origin(self, leaf: Tensor) -> GradientEdge | None:
        """The edge of the graph that a leaf continues, if it was made at one of these borders."""
        return None if self._origins is None else self._origins.get(leaf)

    def rebase(self) -> None:
        """Behind a block: where it changed what was given, others who hold that go on with the change's history."""
        for each in self.given:
            made = each.fresh()
            if made is not None and made._version != each.version:
                for known, value in each.alive():
                    _Rebased.apply(value, made)  # type: ignore[no-untyped-call]
                    each.values[known] = value._version
                each.version = made._version
        self._new, self.leaves = [], {}

    def check(self, where: str) -> None:
        """Before a block: refuses changes that the model made since, of what it holds under another name too.

        Raises:
            WrapError: naming the block.
        """
        held = [(each, made) for each in self.given if each.alive() and (made := each.fresh()) is not None]
        self.given = [each for each, _ in held]
        if any(
            made._version != each.version or any(value._version != each.values[known] for known, value in each.alive())
            for each, made in held
        ):
            raise WrapError(
                f"before {where}, between blocks, the model changes in place what a block was given, and holds or has "
                "saved the same values under another name; make the change on a copy, or use schedule='accumulate'"
            )

    def end(self) -> None:
        """Lets go of values; backward needs the rest."""
        self._new, self.given, self.leaves = [], [], {}

    def forget(self) -> None:
        """Lets go of everything."""
        self.end()
        self._origins = None
        self.hooked.clear()

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._cut_tensor(value)
        if value is None or isinstance(value, (list, dict, bool, int, str)):
            return value
        return tree_map(self._cut_tensor, value, is_leaf=lambda each: isinstance(each, (list, dict)))

    def _note_origin(self, leaf: Tensor, edge: GradientEdge) -> None:
        if self._origins is None:  # most passes have one piece
            self._origins = WeakTensorKeyDictionary()
        self._origins[leaf] = edge

    def _cut_tensor(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.grad_fn is None or not torch.is_grad_enabled():
            return value
        if value.grad_fn._sequence_nr() >= self.borders[-1][1] or value.is_conj() or value.is_neg():
            return value  # made in this piece, or not in memory as it is: the graph tells
        for known, made in self._new:
            if known is value:
                return made
        leaf = value.detach().requires_grad_()
        leaf.__dict__[_MARK] = True
        self._note_origin(leaf, get_gradient_edge(value))
        made = fresh(leaf)
        self.leaves[id(made)] = leaf
        self._new.append((value, made))
        stood_for = [each.values for each in self.given if each.fresh() is value]
        values = {
            known: version
            for before in (*stood_for, {TensorWeakRef(value): value._version})
            for known, version in before.items()
        }
        self.given.append(_Cut(TensorWeakRef(made), made._version, values))
        return made


def is_cut(leaf: Tensor) -> bool:
    """Whether a leaf was made by a cut, of whatever pass."""
    return _MARK in leaf.__dict__


def fresh(leaf: Tensor) -> Tensor:
    """A leaf's value as a tensor that may be changed in place; its gradient goes to the leaf.

    Also where no history is kept at the moment: what a block takes under `no_grad` may be used behind it, too.
    """
    made: Tensor = _AS_IT_IS(leaf, list(leaf.shape))
    if leaf.requires_grad and not made.requires_grad:
        with torch.enable_grad():
            made = _AS_IT_IS(leaf, list(leaf.shape))
    return made


class _Rebased(Function):
    """A value whose memory was changed elsewhere takes over the history of that change."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.of_view = inputs[0]._is_view()
        ctx.mark_dirty(inputs[0])
        return inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # torch takes "nothing" for the part of a view as nothing for the whole of its base
        return torch.zeros_like(gradients[0]) if ctx.of_view else None, gradients[0]
