"""One piece's backward in two halves: first what others wait for, the gradients of weights later (arXiv 2401.10241).

The first half goes along every path to an input and keeps what arrives at the nodes where a path to a weight turns off;
the second goes on from there. Only what both need is kept alive between them. A weight that paths reach in several ways
is done with the first half, since going back from one turn would come through another.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from meshwright.parallel.errors import WrapError

__all__ = ["Edge", "Later", "first_half", "going_back", "refuse_hook", "run_engine"]

Edge = tuple[Any, int]
"""A node of the graph and which of its outputs."""


@dataclass
class Later:
    """What the second half starts from.

    Attributes:
        turns: nodes of the paths to inputs, with what arrived at each of their outputs and the edges to weights.
        roots: gradients that lie on paths to weights only.
        weights: leaves to be reached.
    """

    turns: list[tuple[dict[Edge, Tensor], list[Edge]]]
    roots: dict[Edge, Tensor]
    weights: list[Any]

    def gradients(self, *, keep: bool = False) -> dict[Any, Tensor]:
        """Gradient by weight's leaf; once. `keep` lets what lies beyond be gone through again."""
        roots = self.roots
        for given, edges in self.turns:
            for edge, gradient in going_back(given, edges, keep=keep).items():
                roots[edge] = roots[edge] + gradient if edge in roots else gradient
        self.turns, self.roots = [], {}
        found: dict[Any, Tensor] = {}
        for edge in [edge for edge in roots if edge[0] in self.weights]:
            found[edge[0]] = roots.pop(edge)
        for (node, _), gradient in going_back(roots, [(node, 0) for node in self.weights], keep=keep).items():
            found[node] = found[node] + gradient if node in found else gradient
        return found


def going_back(roots: Mapping[Edge, Tensor], targets: Iterable[Edge], *, keep: bool = False) -> dict[Edge, Tensor]:
    """Gradients that reach `targets` from those given at `roots`; `keep` lets the graph be gone through again."""
    wanted = list(targets)
    if not roots or not wanted:
        return {}
    found = run_engine(roots, wanted, keep=keep)
    return {edge: each for edge, each in zip(wanted, found, strict=True) if each is not None}


def run_engine(
    roots: Mapping[Edge, Tensor], targets: Sequence[Edge] = (), *, keep: bool = False
) -> Sequence[Tensor | None]:
    """What `torch.autograd.grad` does, and without targets `torch.autograd.backward`.

    These also compare shapes of gradients and roots, which takes longer than a small block; here the engine made both.
    """
    found: Sequence[Tensor | None] = torch.autograd.graph._engine_run_backward(
        tuple(GradientEdge(*edge) for edge in roots),
        tuple(roots.values()),
        keep,
        False,
        tuple(GradientEdge(*edge) for edge in targets),
        allow_unreachable=True,
        accumulate_grad=not targets,
    )
    return found


def refuse_hook(node: Any) -> None:
    """Says that a hook cannot be called as in the plain run.

    Raises:
        WrapError: always.
    """
    raise WrapError(
        f"a hook on what {node.name()} gives would be called more than once, or with a part of the gradient, since "
        "blocks share it; put it on a value inside one block, or use schedule='accumulate'"
    )


def first_half(
    roots: Mapping[Edge, Tensor],
    inputs: list[Edge],
    weights: list[Any],
    *,
    follow: Callable[[Any], bool],
    keep: bool = False,
    hooked: Set[Any] = frozenset(),
) -> tuple[dict[Edge, Tensor], dict[Any, Tensor], Later]:
    """Goes back to inputs.

    Args:
        roots: gradients that arrived at the piece.
        inputs: edges to be reached now.
        weights: leaves to be reached later.
        follow: whether a node belongs to the piece.
        keep: the graph is gone through again even if nothing is left for later.
        hooked: nodes whose tensors got hooks.

    Returns:
        Gradients of inputs, those of weights that could not be told apart from them, and what is left for later.
    """
    graph = _Graph(roots, {node for node, _ in inputs}, set(weights), follow=follow)
    aside = {edge: each for edge, each in roots.items() if edge[0] not in graph.to_inputs}
    early = [(node, 0) for node in weights if node in graph.early]
    ahead = roots if early else {edge: each for edge, each in roots.items() if edge not in aside}
    turns = list(graph.turns())
    for node in hooked & {node for _, off in turns for node, _ in off}:
        refuse_hook(node)
    arriving = [edge for edges, _ in turns for edge in edges]
    found = going_back(ahead, dict.fromkeys([*inputs, *early, *arriving]), keep=bool(keep or turns or aside))
    given = [(_chosen(found, edges), off) for edges, off in turns]
    left = [each for each in weights if each not in graph.early]
    done = {node: gradient for (node, _), gradient in _chosen(found, early).items()}
    return _chosen(found, inputs), done, Later([each for each in given if each[0]], aside, left)


def _chosen(found: Mapping[Edge, Tensor], edges: Iterable[Edge]) -> dict[Edge, Tensor]:
    return {edge: found[edge] for edge in edges if edge in found}


class _Graph:
    """The nodes of a piece: which lead to inputs, and where paths to weights turn off."""

    def __init__(
        self, roots: Iterable[Edge], inputs: set[Any], weights: set[Any], *, follow: Callable[[Any], bool]
    ) -> None:
        self._inputs = inputs
        self._weights = weights
        self._follow = follow
        self._entered: dict[Any, set[int]] = {}
        self._reached_by: Counter[Any] = Counter()
        self.to_inputs: set[Any] = set()
        self._to_weights: set[Any] = set()
        self._order = list(self._walk([node for node, _ in roots]))  # a node after all that it leads to
        for node, number in roots:
            self._entered.setdefault(node, set()).add(number)
            self._reached_by[node] += 1
        for node in self._order:
            self._classify(node)
        self.early = set(self._early())

    def turns(self) -> Iterator[tuple[list[Edge], list[Edge]]]:
        """Edges into a node that leads to inputs and weights, and those of its own that lead to weights only."""
        for node in self._order:
            if not self._goes_on(node):
                continue
            off = [edge for edge in _next(node) if node in self.to_inputs and self._is_late(edge[0])]
            if off:
                yield [(node, number) for number in sorted(self._entered[node])], list(dict.fromkeys(off))

    def _is_late(self, node: Any) -> bool:
        return node in self._to_weights and node not in self.to_inputs and node not in self.early

    def _walk(self, roots: list[Any]) -> Iterator[Any]:
        seen: set[Any] = set()
        todo = [(node, False) for node in roots]
        while todo:
            node, left = todo.pop()
            if left:
                yield node
            elif node not in seen:
                seen.add(node)
                todo.append((node, True))
                if self._goes_on(node):
                    todo += [(after, False) for after, _ in _next(node)]

    def _goes_on(self, node: Any) -> bool:
        return node not in self._weights and node not in self._inputs and self._follow(node)

    def _classify(self, node: Any) -> None:
        if node in self._inputs:
            self.to_inputs.add(node)
        if node in self._weights:
            self._to_weights.add(node)
        if not self._goes_on(node):
            return
        after = {each for each, _ in _next(node)}
        for each, number in _next(node):
            self._entered.setdefault(each, set()).add(number)
        self._reached_by.update(after)
        if after & self.to_inputs:
            self.to_inputs.add(node)
        if after & self._to_weights:
            self._to_weights.add(node)

    def _early(self) -> Iterator[Any]:
        """What only leads to weights and is reached in several ways, and all that it leads to."""
        spread: set[Any] = set()
        for node in reversed(self._order):
            several = self._reached_by[node] > 1 and node not in self.to_inputs
            if node in spread or several:
                yield node
                if self._goes_on(node):
                    spread.update(each for each, _ in _next(node) if each not in self.to_inputs)


def _next(node: Any) -> list[Edge]:
    return [(after, number) for after, number in node.next_functions if after is not None]
