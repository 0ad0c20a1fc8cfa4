"""Backward piece by piece: the autograd graph of one forward pass, cut where its pieces meet.

A piece is a block, or what lies between two blocks. Values that enter or leave a block are new leaves with a remembered
origin (see `capture`). A node of the graph belongs to the piece in which it was made, told by its sequence number, so
values that a model hands on besides (skips between blocks, router logits collected on the side) need no mark: going
back through a piece stops at edges into earlier ones, whose gradients are kept until their piece is gone through.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from meshwright.parallel.cuts import is_cut
from meshwright.parallel.errors import WrapError
from meshwright.parallel.halves import Edge, Later, first_half, going_back, refuse_hook, run_engine

__all__ = ["Pieces"]

_FUNCTIONS: Any = torch._C._functions


@dataclass
class _Piece:
    """What going back through a piece needs: where it begins, and what it reaches."""

    roots: dict[Edge, Tensor] = field(default_factory=dict)
    leaves: dict[Any, None] = field(default_factory=dict)
    edges: dict[Edge, None] = field(default_factory=dict)
    closed: list[Any] = field(default_factory=list)


class Pieces:
    """The graph behind some values.

    Args:
        borders: sequence number at which each piece begins, ascending.
        origin: leaf -> the edge that it continues, where it was made at a border.
        ends: values whose gradients will be given: the loss, or what other ranks go on with.
        received: leaves without an origin here, whose gradients others wait for.
        hooked: nodes whose tensors got hooks.

    Raises:
        WrapError: for hooks that would be called more than once, or with a part of a gradient.
    """

    def __init__(
        self,
        borders: Sequence[int],
        origin: Callable[[Tensor], GradientEdge | None],
        ends: Sequence[Tensor],
        *,
        received: Sequence[Tensor] = (),
        hooked: Set[Any] = frozenset(),
    ) -> None:
        self._borders = borders
        self._origin = origin
        self._received = {id(each): each for each in received}
        self._pieces = [_Piece() for _ in borders]
        self._num_users: defaultdict[Any, int] = defaultdict(int)
        self._shared: set[Any] = set()
        self._inputs: dict[Any, Edge | None] = {}  # leaves of inputs -> what they continue, None where others made it
        self._partial: dict[Any, Tensor] = {}
        self._late: dict[int, tuple[_Piece, list[Any], dict[Any, Tensor], Later]] = {}
        self._done: set[int] = set()
        self._hooked = hooked
        self._ends: Sequence[Tensor] | None = ends  # until what is behind them was seen
        if len(borders) > 1 or hooked:  # torch goes back through one piece by itself
            self._see()

    def give(self, value: Tensor, gradient: Tensor) -> None:
        """Adds to the gradient of one of the ends, before its piece is gone through."""
        if value.grad_fn is not None:
            self._keep((value.grad_fn, value.output_nr), gradient)

    def backward(self, piece: int) -> None:
        """Adds the gradients of a piece to its parameters, as torch itself does; later pieces must be done.

        A parameter that several pieces use gets the sum of their gradients with the last of them that is done.
        """
        mine, inputs, weights = self._begin(piece)
        if self._ends is not None:
            self._ends = ()
            if mine.roots:
                run_engine(mine.roots)  # adds to what was received, too
            return
        if not mine.edges and self._shared.isdisjoint(weights):
            self._straight(mine, inputs)
            return
        with _closed(mine.closed):
            wanted = [*((node, 0) for node in weights), *inputs]
            found = going_back(mine.roots, wanted, keep=bool(mine.closed))  # what is closed is gone through later
        self._hand_on({edge: found[edge] for edge in inputs if edge in found})
        self._add(weights, {node: found[node, 0] for node in weights if (node, 0) in found})

    def _straight(self, mine: _Piece, inputs: Iterable[Edge]) -> None:
        """Where a piece ends in leaves of its own, torch adds to them by itself."""
        if not mine.roots:
            return
        found: dict[Edge, Tensor] = {}
        handles = [edge[0].register_prehook(partial(_catch, found, edge)) for edge in inputs]
        try:
            run_engine(mine.roots)
        finally:
            for each in handles:
                each.remove()
        self._hand_on(found)

    def backward_inputs(self, piece: int) -> None:
        """The first half of `backward`: what earlier pieces wait for."""
        self._see()
        mine, inputs, weights = self._begin(piece)
        with _closed(mine.closed):
            found, early, later = first_half(
                mine.roots,
                inputs,
                weights,
                follow=lambda node: self._home(node) == piece,
                hooked=self._hooked,
                keep=bool(mine.closed),
            )
        self._hand_on(found)
        self._late[piece] = mine, weights, early, later

    def backward_weights(self, piece: int) -> None:
        """The second half: adds the gradients of a piece to its parameters."""
        mine, weights, early, later = self._late.pop(piece)
        with _closed(mine.closed):
            self._add(weights, {**early, **later.gradients(keep=bool(mine.closed))})

    def goes_beyond(self, piece: int) -> bool:
        """Whether torch comes by nodes of other pieces when this one goes back."""
        return bool(self._pieces[piece].closed)

    def _begin(self, piece: int) -> tuple[_Piece, list[Edge], list[Any]]:
        """Takes a piece, edges to its inputs, and leaves of its weights."""
        mine, self._pieces[piece] = self._pieces[piece], _Piece()
        self._done.add(piece)
        inputs = [(node, 0) for node in mine.leaves if node in self._inputs]
        return mine, [*inputs, *mine.edges], [node for node in mine.leaves if node not in self._inputs]

    def _hand_on(self, gradients: Mapping[Edge, Tensor]) -> None:
        """Keeps gradients for the pieces that the values came from; adds those of received values to `.grad`."""
        for edge, gradient in gradients.items():
            origin = self._inputs.pop(edge[0], edge)
            if origin is None:
                edge[0](gradient)
            else:
                self._keep(origin, gradient)

    def _add(self, weights: Iterable[Any], gradients: Mapping[Any, Tensor]) -> None:
        for node in weights:
            if node in gradients:
                known, gradient = self._partial.get(node), gradients[node]
                self._partial[node] = gradient if known is None else _sum(known, gradient)
            self._num_users[node] -= 1
            if not self._num_users[node] and node in self._partial:
                node(self._partial.pop(node))  # adds to .grad and calls the hooks that wait for it

    def _keep(self, edge: Edge, gradient: Tensor) -> None:
        home = self._home(edge[0])
        if home in self._done:
            raise WrapError(
                f"a gradient reaches {edge[0].name()} after the part of the model that it belongs to has gone back; "
                "was it made in another thread? use schedule='accumulate'"
            )
        roots = self._pieces[home].roots
        roots[edge] = _sum(roots[edge], gradient) if edge in roots else gradient

    def _home(self, node: Any) -> int:
        if len(self._borders) == 1:
            return 0
        return max(0, bisect_right(self._borders, node._sequence_nr()) - 1)  # older ones belong to the first

    def _see(self) -> None:
        """Finds out, once, what each piece reaches and what pieces share."""
        if self._ends is None:
            return
        roots = dict.fromkeys(each.grad_fn for each in self._ends if each.grad_fn is not None)
        self._ends = None
        if roots:
            self._look(roots)
            _close(self._pieces)
            self._shared = {node for node, number in self._num_users.items() if number > 1}
            cut = {node for node in self._hooked if any(after in self._inputs for after, _ in node.next_functions)}
            weights = [node for node in self._shared if node.variable._backward_hooks]
            for node in (*(self._hooked & _gone_by(self._pieces)), *cut, *weights):
                refuse_hook(node)  # it would see a gradient in parts, or twice
        self._received.clear()

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
                if isinstance(after, _FUNCTIONS.AccumulateGrad):
                    following = self._ended(self._pieces[home], after)
                    if following is None:
                        continue
                else:
                    following = after
                    _pass(self._pieces[home], (after, number), self._home(after) - home)
                if following not in seen:
                    seen.add(following)
                    todo.append(following)

    def _ended(self, piece: _Piece, leaf: Any) -> Any:
        """Notes a leaf of a piece; returns the node where the graph goes on behind it, None where it does not."""
        if leaf not in piece.leaves:
            piece.leaves[leaf] = None
            variable = leaf.variable
            origin = self._origin(variable) if is_cut(variable) else None
            if origin is not None:
                self._inputs[leaf] = origin.node, origin.output_nr
            elif id(variable) in self._received:
                self._inputs[leaf] = None
            else:
                _refuse_others(variable)
                self._num_users[leaf] += 1
        continues = self._inputs.get(leaf)
        return None if continues is None else continues[0]


def _pass(piece: _Piece, edge: Edge, distance: int) -> None:
    """Notes an edge from a node of a piece into another one, `distance` pieces on."""
    if distance < 0:
        piece.edges[edge] = None
    elif distance > 0:
        raise WrapError(f"{edge[0].name()} was made in another thread; use schedule='accumulate'")


def _close(pieces: Iterable[_Piece]) -> None:
    """Notes what torch would go through, from a piece's edge into an earlier one to another of its targets."""
    for piece in pieces:
        passing = {node for node, _ in piece.edges}
        targets = {*passing, *piece.leaves}
        piece.closed = [node for node in passing if _beyond({node}) & targets]


def _refuse_others(weight: Tensor) -> None:
    if is_cut(weight):
        raise WrapError(
            "one micro-batch uses differentiable values that another one made (kept on a module, or in a list?); "
            "schedules run them in turns, so hand such values from block to block, or use schedule='accumulate'"
        )


def _catch(found: dict[Edge, Tensor], edge: Edge, gradients: tuple[Tensor | None, ...]) -> tuple[None]:
    """Takes what arrives at a leaf as it is: added to `.grad` it would be laid out anew."""
    if gradients[0] is not None:
        found[edge] = gradients[0]
    return (None,)


def _gone_by(pieces: Iterable[_Piece]) -> set[Any]:
    """Nodes of the graph that torch comes by for several pieces."""
    edges = {node for piece in pieces for node, _ in piece.edges}
    return edges.union(*(_beyond(set(piece.closed)) for piece in pieces))


def _sum(one: Tensor, other: Tensor) -> Tensor:
    return other + one if one.is_sparse else one + other


@contextmanager
def _closed(nodes: Iterable[Any]) -> Iterator[None]:
    """Lets nothing through nodes whose own piece will be gone through later."""
    handles = [node.register_prehook(lambda gradients: (None,) * len(gradients)) for node in nodes]
    try:
        yield
    finally:
        for each in handles:
            each.remove()


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
