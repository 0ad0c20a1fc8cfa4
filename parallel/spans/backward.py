"""Backward of a block by spans: from its output to what attention gave, through attention, and on to its input."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from meshwright.parallel.blockwise.aliases import aliases
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.block_dropout import BlockDropout
from meshwright.parallel.blockwise.calls import called
from meshwright.parallel.spans.arguments import Given
from meshwright.parallel.spans.call import SpanCall, Visit
from meshwright.parallel.spans.forward import Kept
from meshwright.parallel.spans.joining import Joining, Pair

__all__ = ["Found", "Wish", "run_at_once", "run_backward"]


@dataclass(frozen=True)
class Wish:
    """Which gradients are asked for: of which tensors of the arguments, and of which parameters, by number."""

    tensors: Sequence[bool]
    parameters: Sequence[int]


@dataclass(frozen=True)
class Found:
    """Gradients of the tensors of the arguments, and of parameters by number."""

    tensors: list[Tensor | None]
    parameters: dict[int, Tensor]


def run_backward(
    call: SpanCall, tensors: Sequence[Tensor], kept: Sequence[Kept], *, gradients: Sequence[Tensor | None], wish: Wish
) -> Found:
    """Goes back span by span.

    Args:
        call: what was run.
        tensors: of the arguments.
        kept: what each attention gave.
        gradients: of the tensors of the output.
        wish: what is asked for.
    """
    visit = Visit(call, tensors, wish.tensors, dropout=BlockDropout(call.spans.full, call.masks))
    with aliases(call.places, wish.parameters) as stand_ins:
        way = _WayBack(visit, kept, [stand_ins[each] for each in wish.parameters])
        with torch.enable_grad():
            way.from_output(gradients)
            for number in reversed(range(len(kept))):
                way.through(number)
    of_tensors = [None if sum_ is None else sum_.to(each.dtype) for sum_, each in zip(way.sums, tensors, strict=True)]
    of_parameters = zip(wish.parameters, way.of_parameters, strict=True)
    return Found(of_tensors, {n: each.to(stand_ins[n].dtype) for n, each in of_parameters if each is not None})


def run_at_once(call: SpanCall, tensors: Sequence[Tensor], *, gradients: Sequence[Tensor | None], wish: Wish) -> Found:
    """The same gradients with a history, from all positions at once."""
    with BlockDropout(call.spans.full, call.masks) as dropout, called(call.module):
        dropout.at(slice(0, call.spans.full))
        args, kwargs = call.arguments.filled(tensors)
        parts = [leaf for leaf in tree_leaves(call.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
    pairs = [(part, each) for part, each in zip(parts, gradients, strict=True) if each is not None]
    learned = [number for number, need in enumerate(wish.tensors) if need]
    inputs = [*(tensors[number] for number in learned), *(call.places[number][0] for number in wish.parameters)]
    outputs, upstream = _apart(pairs)
    found = torch.autograd.grad(outputs, inputs, upstream, create_graph=True, allow_unused=True)
    of_tensors = dict(zip(learned, found, strict=False))
    of_parameters = dict(zip(wish.parameters, found[len(learned) :], strict=True))
    given = {number: each for number, each in of_parameters.items() if each is not None}
    return Found([of_tensors.get(number) for number in range(len(tensors))], given)


class _WayBack:
    """Gradients so far.

    Attributes:
        sums: for each tensor of the arguments; None where it is not asked for.
        of_parameters: in order.
    """

    def __init__(self, visit: Visit, kept: Sequence[Kept], parameters: Sequence[Tensor]) -> None:
        self._visit, self._kept, self._parameters = visit, kept, parameters
        self._pulled = [torch.zeros_like(each.out) for each in kept]
        asked = zip(visit.tensors, visit.call.arguments.dims, visit.learned, strict=True)
        self.sums = [_zeros(each, dim) if need else None for each, dim, need in asked]
        self.of_parameters: list[Tensor | None] = [None] * len(parameters)

    def from_output(self, gradients: Sequence[Tensor | None]) -> None:
        """From the output back to what attention gave."""
        for span, given in self._visit:
            answers = self._answers(span, len(self._kept))
            output, asked = self._visit.run(given, answers)
            parts = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            pairs = zip(parts, gradients, strict=True)
            upstream = [(part, each[..., span, :]) for part, each in pairs if each is not None]
            self._add(upstream, span, given=given, answers=answers)
            for number, each in enumerate(asked):
                self._visit.join(number, each, span)

    def through(self, number: int) -> None:
        """Through an attention, and what is ahead of it."""
        joined = self._visit.joined.pop(number)
        gradients = self._of_attention(number, joined)
        for span, given in self._visit:
            answers = self._answers(span, number)
            _, asked = self._visit.run(given, answers)
            self._add(joined.parts(asked[number], gradients, span), span, given=given, answers=answers)

    def _answers(self, span: slice, number: int) -> list[Tensor]:
        return [each.at(span).detach().requires_grad_() for each in self._kept[:number]]

    def _of_attention(self, number: int, joined: Joining) -> dict[str, Tensor]:
        whole, leaves = joined.whole()
        if not leaves:
            return {}
        options = self._visit.keywords(number, whole)
        options["known"] = self._kept[number]
        out = attend(whole.query, whole.key, whole.value, with_lse=False, **options)
        found = torch.autograd.grad(out, list(leaves.values()), self._pulled.pop(), allow_unused=True)
        return {name: each for name, each in zip(leaves, found, strict=True) if each is not None}

    def _add(self, pairs: Iterable[Pair], span: slice, *, given: Given, answers: Sequence[Tensor]) -> None:
        """Goes back from some tensors of a span, with their gradients, and adds up what comes out."""
        pairs = [(tensor, each) for tensor, each in pairs if tensor.requires_grad]
        learned = [each for each in given.tensors if each.requires_grad]
        inputs = [*learned, *answers, *self._parameters]
        if not pairs or not inputs:
            return
        outputs, upstream = _apart(pairs)
        found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
        sums = [*self._sums_at(span), *(each[:, :, span] for each in self._pulled[: len(answers)])]
        for total, each in zip(sums, found, strict=False):
            if each is not None:
                total.add_(each)
        self._add_parameters(found[len(sums) :])

    def _sums_at(self, span: slice) -> list[Tensor]:
        dims = self._visit.call.arguments.dims
        asked = [(each, dim) for each, dim in zip(self.sums, dims, strict=True) if each is not None]
        size = span.stop - span.start
        return [each if dim is None else each.narrow(dim, span.start, size) for each, dim in asked]

    def _add_parameters(self, gradients: Sequence[Tensor | None]) -> None:
        for number, each in enumerate(gradients):
            if each is not None:
                total = self.of_parameters[number]
                self.of_parameters[number] = each.to(_wide(each)) if total is None else total.add_(each)


def _apart(pairs: Iterable[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    outputs, gradients = map(list, zip(*pairs, strict=True))
    return outputs, gradients


def _zeros(tensor: Tensor, dim: int | None) -> Tensor:
    """For a sum over spans, in float32 or wider; what belongs to a span has few addends."""
    return torch.zeros_like(tensor, dtype=_wide(tensor) if dim is None else tensor.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
