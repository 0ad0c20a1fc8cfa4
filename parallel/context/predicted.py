"""Which collectives one step runs along `cp`, by formula: equal to what the ledger counts on the first rank.

Those of blocks beside their attention are what the proof of each counted on the example; attention follows `traffic`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from meshwright.parallel.blockwise.loss import find_heads
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.chosen import ContextWay
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.join import join_pieces
from meshwright.parallel.context.kinds import ulysses_degree
from meshwright.parallel.context.plan import Attends, ContextPlan, Scored, Seen
from meshwright.parallel.context.route import Route
from meshwright.parallel.context.routes import route_for
from meshwright.parallel.context.traffic import Sending, Shape, sendings_of
from meshwright.parallel.ledger import Call

__all__ = ["DealtLoss", "losses_of", "microbatch_calls", "reason_unknown"]

_AXIS = "cp"


def reason_unknown(plan: ContextPlan, way: ContextWay, sizes: Blockwise | None) -> str | None:
    """Why the collectives cannot be told from the example, or None where they can."""
    exchanges = ulysses_degree(way.kind, plan.degree) > 1
    odd = [path for path, each in plan.attends.items() if exchanges and each.seen is not None and each.seen.biased]
    if odd:
        return f"{odd[0]} adds to the scores of each query what is exchanged with them"
    if sizes is not None and sizes.loss_block is not None and not plan.losses:
        return "the example computes no loss, whose rows are dealt; pass example= with labels"
    return None


@dataclass(frozen=True)
class DealtLoss:
    """A cross entropy whose rows are dealt.

    Args:
        head: path of the matrix that makes its scores.
        scored: rows and classes.
        inputs: of a row.
        summed: elements of each trained parameter of the head that a rank holds.
    """

    head: str
    scored: Scored
    inputs: int
    summed: tuple[int, ...]


def losses_of(plan: ContextPlan, model: nn.Module, *, mine: nn.Module, sizes: Blockwise | None) -> list[DealtLoss]:
    """The losses whose rows are dealt.

    Args:
        plan: along `cp`.
        model: whole.
        mine: what a rank of `tp` holds of it.
        sizes: of blocks.
    """
    if sizes is None or sizes.loss_block is None:
        return []
    found = []
    for path in find_heads(model):
        weight, held = model.get_submodule(path).weight, mine.get_submodule(path)
        assert isinstance(weight, Tensor), type(weight)
        trained = tuple(each.numel() for each in held.parameters(recurse=False) if each.requires_grad)
        classes, inputs = max(weight.shape), min(weight.shape)  # heads widen
        found += [DealtLoss(path, each, inputs, trained) for each in plan.losses if each.classes == classes]
    return found


def microbatch_calls(
    plan: ContextPlan, way: ContextWay, losses: Iterable[DealtLoss], *, itemsize: int, tp: int
) -> Iterator[Call]:
    """The collectives of one micro-batch like the example.

    Args:
        plan: along `cp`.
        way: how keys and queries meet.
        losses: whose rows are dealt.
        itemsize: bytes of an element.
        tp: over which heads are dealt besides.
    """
    for calls in plan.calls.values():
        yield from (Call(_AXIS, kind, plan.degree, elements * itemsize) for kind, elements in calls)
    for each in plan.attends.values():
        for sending in _sendings(each, way, degree=plan.degree, tp=tp):
            size_bytes = sending.elements * (max(itemsize, 4) if sending.of == "summed" else itemsize)
            kept = 0 if sending.kind == "all_to_all" else -1
            yield Call(_AXIS, sending.kind, sending.ranks, size_bytes, kept)
    for loss in losses:
        yield from _loss_calls(loss, plan.degree, itemsize)


def _sendings(attends: Attends, way: ContextWay, *, degree: int, tp: int) -> Iterable[Sending]:
    seen = attends.seen
    if seen is None or not attends.dealt:
        return []
    shape = Shape(
        batch=seen.batch,
        length=seen.length,
        heads=-(-attends.heads // tp),
        kv_heads=-(-attends.kv_heads // tp),
        width=attends.width,
        value_width=seen.value_width,
    )
    dealing = Dealing(way.dealing, degree)
    route = _route(seen, dealing, ulysses_degree(way.kind, degree))
    found: list[Sending] = []
    for backward in (False, True)[: 1 + seen.learned]:
        found += sendings_of(shape, dealing, way.kind, rank=0, backward=backward, route=route)
    return found * seen.times


def _route(seen: Seen, dealing: Dealing, group: int) -> Route | None:
    """Who needs whose keys; None where only values tell, and everybody is taken to need all."""
    if seen.window is None:
        return None
    pieces = [dealing.pieces(seen.length, rank) for rank in range(dealing.degree)]
    groups = [join_pieces(pieces[first : first + group]).pieces for first in range(0, dealing.degree, group)]
    return route_for(None if seen.window == (None, None) else Band(*seen.window), tuple(groups))


def _loss_calls(loss: DealtLoss, degree: int, itemsize: int) -> Iterator[Call]:
    """The loss itself, the gradient of its rows, the sums of those of the head."""
    wide, padded = max(itemsize, 4), -(-loss.scored.rows // degree) * degree
    if loss.scored.reduced:
        yield Call(_AXIS, "all_reduce", degree, wide)
    else:
        yield Call(_AXIS, "all_gather", degree, padded * wide)
    yield Call(_AXIS, "all_gather", degree, padded * loss.inputs * itemsize)
    for elements in loss.summed:
        yield Call(_AXIS, "all_reduce", degree, elements * wide)
