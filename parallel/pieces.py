"""Backward piece by piece: the autograd graph of one forward pass, cut where its pieces meet.

Every node belongs to the piece in which it was made, told by its sequence number. Going back through a piece stops at
edges into earlier ones: their gradients are kept until all later pieces have been gone through. So values that
several pieces use (skips, encoder states, router logits that a model collects on the side) need no mark, no value is
detached, and each node runs once.
"""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["Pieces"]

_Edge = tuple[Any, int]


class Pieces:
    """The graph behind a loss.

    Args:
        borders: sequence number at which each piece begins, ascending.
        loss: 0-dim.
        weight: gradient of the loss itself.
    """

    def __init__(self, borders: list[int], origins: Mapping[Tensor, GradientEdge], loss: Tensor, weight: Tensor) -> None:
        self._borders = borders
        self._origins = origins
        self._kept: list[dict[_Edge, Tensor]] = [{} for _ in borders]
        edge = get_gradient_edge(loss)
        self._keep((edge.node, edge.output_nr), weight)

    def backward(self, piece: int) -> None:
        """Adds the gradients of a piece to its parameters; later pieces must be done."""
        roots = self._kept[piece]
        self._kept[piece] = {}
        if not roots:
            return
        leaves, edges = self._targets(roots, self._borders[piece])
        if not leaves and not edges:
            return
        found = torch.autograd.grad(
            [GradientEdge(*edge) for edge in roots],
            [*leaves, *(GradientEdge(*edge) for edge in edges)],
            list(roots.values()),
            allow_unused=True,
        )
        for leaf, gradient in zip(leaves, found, strict=False):
            if gradient is None:
                continue
            if leaf in self._origins:
                origin = self._origins[leaf]
                self._keep((origin.node, origin.output_nr), gradient)
            else:
                _accumulate(leaf, gradient)
        for edge, gradient in zip(edges, found[len(leaves) :], strict=True):
            if gradient is not None:
                self._keep(edge, gradient)

    def _keep(self, edge: _Edge, gradient: Tensor) -> None:
        home = bisect_right(self._borders, edge[0]._sequence_nr()) - 1
        kept = self._kept[home]
        kept[edge] = kept[edge] + gradient if edge in kept else gradient

    def _targets(self, roots: dict[_Edge, Tensor], start: int) -> tuple[list[Tensor], list[_Edge]]:
        leaves: dict[int, Tensor] = {}
        edges: dict[_Edge, None] = {}
        seen: set[Any] = set()
        todo = [node for node, _ in roots]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for after, number in node.next_functions:
                if after is None:
                    continue
                if hasattr(after, "variable"):
                    leaves[id(after.variable)] = after.variable
                elif after._sequence_nr() < start:
                    edges[after, number] = None
                else:
                    todo.append(after)
        return list(leaves.values()), list(edges)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    if leaf.grad is None:
        leaf.grad = gradient.clone() if gradient._is_view() else gradient
    else:
        leaf.grad.add_(gradient)
