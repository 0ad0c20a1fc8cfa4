"""Backward piece by piece: the autograd graph of one forward pass, cut where its pieces meet.

A piece is a block, or what lies between two blocks. Values that enter or leave a block are new leaves with a remembered
origin (see `capture`). A node of the graph belongs to the piece in which it was made, told by its sequence number, so
values that a model hands on besides (skips between blocks, router logits collected on the side) need no mark: going
back through a piece stops at edges into earlier ones, whose gradients are kept until their piece is gone through.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshwright.parallel.errors import WrapError

__all__ = ["Pieces"]

_Edge = tuple[Any, int]
_FUNCTIONS: Any = torch._C._functions


@dataclass
class _Piece:
    """What going back through a piece needs: where it begins, and what it reaches."""

    roots: dict[_Edge, Tensor] = field(default_factory=dict)
    leaves: dict[Any, None] = field(default_factory=dict)
    edges: dict[_Edge, None] = field(default_factory=dict)


class Pieces:
    """The graph behind some values.

    Args:
        borders: sequence number at which each piece begins, ascending.
        origins: leaf made at a border -> the edge that it continues.
        ends: values whose gradients will be given: the loss, or what other ranks go on with.
    """

    def __init__(self, borders: Sequence[int], origins: Mapping[Tensor, GradientEdge], ends: Sequence[Tensor]) -> None:
        self._borders = borders
        self._origins = origins
        self._pieces = [_Piece() for _ in borders]
        self._first: dict[Any, int] = {}
        self._partial: dict[Any, Tensor] = {}
        roots = dict.fromkeys(each.grad_fn for each in ends if each.grad_fn is not None)
        if roots:
            self._look(roots)
            self._check()

    def give(self, value: Tensor, gradient: Tensor) -> None:
        """Adds to the gradient of one of the ends, before its piece is gone through."""
        if value.grad_fn is not None:
            edge = get_gradient_edge(value)
            self._keep((edge.node, edge.output_nr), gradient)

    def backward(self, piece: int) -> None:
        """Adds the gradients of a piece to its parameters, as torch itself does; later pieces must be done.

        A parameter that several pieces use gets the sum of their gradients with the first of them.
        """
        mine, self._pieces[piece] = self._pieces[piece], _Piece()
        if mine.roots and (mine.leaves or mine.edges):
            targets = [GradientEdge(*edge) for edge in (*((node, 0) for node in mine.leaves), *mine.edges)]
            roots = [GradientEdge(*edge) for edge in mine.roots]
            found = iter(torch.autograd.grad(roots, targets, list(mine.roots.values()), allow_unused=True))
            for node, gradient in zip(mine.leaves, found, strict=False):
                self._take(node, gradient)
            for edge, gradient in zip(mine.edges, found, strict=True):
                if gradient is not None:
                    self._keep(edge, gradient)
        for node in [node for node in self._partial if self._first[node] == piece]:
            node(self._partial.pop(node))  # adds to .grad and calls the hooks that wait for it

    def _take(self, node: Any, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        origin = self._origins.get(node.variable)
        if origin is None:
            self._partial[node] = self._partial[node] + gradient if node in self._partial else gradient
        else:
            self._keep((origin.node, origin.output_nr), gradient)

    def _keep(self, edge: _Edge, gradient: Tensor) -> None:
        roots = self._pieces[self._home(edge[0])].roots
        roots[edge] = roots[edge] + gradient if edge in roots else gradient

    def _home(self, node: Any) -> int:
        return bisect_right(self._borders, node._sequence_nr()) - 1

    def _look(self, roots: Iterable[Any]) -> None:
        """Goes through the whole graph once and notes what each piece reaches."""
        seen = set(roots)
        todo = list(seen)
        while todo:
            node = todo.pop()
            home = self._home(node)
            for after, number in node.next_functions:
                if after is None:
                    continue
                following = self._reached(home, after, number)
                if following is not None and following not in seen:
                    seen.add(following)
                    todo.append(following)

    def _check(self) -> None:
        """Refuses what torch would go through twice: from a piece's edge into an earlier one to another of its targets.

        Raises:
            WrapError: naming the operation.
        """
        for piece in self._pieces:
            passing = {node for node, _ in piece.edges}
            for node in _beyond(passing) & {*passing, *piece.leaves}:
                raise WrapError(
                    f"schedule='layered': what {node.name()} gives passes blocks by in two ways, one made from the "
                    "other; use schedule='accumulate'"
                )

    def _reached(self, home: int, node: Any, number: int) -> Any:
        """Notes an edge that leaves a node of piece `home`; returns the node where the graph goes on."""
        if not isinstance(node, _FUNCTIONS.AccumulateGrad):
            if self._home(node) < home:
                self._pieces[home].edges[node, number] = None
            return node
        self._pieces[home].leaves[node] = None
        origin = self._origins.get(node.variable)
        if origin is not None:
            return origin.node
        self._first[node] = min(home, self._first.get(node, home))
        return None


def _beyond(nodes: set[Any]) -> set[Any]:
    """Every node that going back from `nodes` comes to, up to the next leaves."""
    seen: set[Any] = set()
    todo = list(nodes)
    while todo:
        for after, _ in todo.pop().next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)
    return seen
