"""A call that works position by position, run block by block, of which only the input is kept.

Backward runs it again, a block at a time, and adds up the gradients of parameters over blocks, in float32 or wider;
autograd gets each of them once, so hooks on parameters are called once. Inner modules see aliases of the parameters
meanwhile, which have no hooks. Second derivatives run the call on all positions at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from meshwright.parallel.blockwise.aliases import Places, aliases, check_versions, places_of, versions_of
from meshwright.parallel.blockwise.block_dropout import BlockDropout
from meshwright.parallel.blockwise.by_position import leaves_of
from meshwright.parallel.blockwise.head import unwatched
from meshwright.parallel.blockwise.wanted import wanted
from meshwright.parallel.thread_state import ThreadState

__all__ = ["Pointwise", "run_by_blocks"]

Work = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pointwise:
    """What is run.

    Args:
        name: for messages.
        modules: whose parameters the work uses.
        work: from the input [..., positions, width] to the output [..., positions, width].
        ahead: the part of the work that gives what forward starts from, where the model did it already.
        block: positions at a time.
    """

    name: str
    modules: tuple[nn.Module, ...]
    work: Work
    ahead: Work | None
    block: int

    def __call__(self, given: Tensor) -> Tensor:
        """The whole work."""
        return self.work(given if self.ahead is None else self.ahead(given))

    def blocks(self, given: Tensor) -> list[slice]:
        """Positions (dim -2) in blocks."""
        length = given.shape[-2]
        return [slice(start, min(start + self.block, length)) for start in range(0, length, self.block)]

    @property
    def places(self) -> Places:
        """Each parameter, and where it lies, as it is now."""
        return places_of(self.modules)


def run_by_blocks(call: Pointwise, given: Tensor, ready: Tensor) -> Tensor:
    """The call's output.

    Args:
        call: what is run.
        given: its input, which is kept.
        ready: what `call.ahead` made of it; the input itself where there is no such part.

    Raises:
        WrapError: in backward, when parameters were changed since.

    >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 2))
    >>> call, x = Pointwise("mlp", (mlp,), mlp, None, block=2), torch.randn(5, 2, requires_grad=True)
    >>> torch.allclose(run_by_blocks(call, x, x), mlp(x))
    True
    """
    state, dropout = ThreadState(), BlockDropout(given.shape[-2])
    known = [each for each, _ in call.places]
    first = call.blocks(given)[0]
    dropout.at(first)
    trained = [number for number, each in enumerate(known) if each.requires_grad]
    with unwatched(), dropout, aliases(call.places, trained) as leaves:
        begun = call(given.detach()[..., first, :].contiguous())
    reached = leaves_of(begun)
    used = [number for number, leaf in enumerate(leaves) if id(leaf) in reached]
    begin = _Begin(state, dropout, begun.detach(), used)
    del begun, leaves
    run: Tensor = _ByBlocks.apply(call, begin, ready.detach(), given, *(known[number] for number in used))  # type: ignore[no-untyped-call]
    return run


@dataclass(frozen=True)
class _Begin:
    """The first block, and what it told: masks, and the numbers of parameters that get gradients."""

    state: ThreadState
    dropout: BlockDropout
    output: Tensor
    used: list[int]


class _ByBlocks(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        call, begin, ready, given = inputs[:4]
        output: Tensor = begin.output.new_empty((*ready.shape[:-1], begin.output.shape[-1]))
        first, *others = call.blocks(ready)
        output[..., first, :] = begin.output
        with begin.dropout as dropout, aliases(call.places, []):
            for block in others:
                dropout.at(block)
                output[..., block, :] = call.work(ready[..., block, :].contiguous())  # models may ask for a view of it
        ctx.call, ctx.state, ctx.used = call, begin.state, begin.used
        ctx.masks = dropout.masks if dropout.kept else None
        ctx.versions = versions_of(call.places)
        ctx.save_for_backward(given)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (given,) = ctx.saved_tensors
        check_versions(ctx.call.name, ctx.versions, "leave the feed-forward out of blockwise=")
        asked = wanted(ctx, [False, False, True, True, *[True] * len(ctx.used)])[3:]
        numbers = [number for number, need in zip(ctx.used, asked[1:], strict=True) if need]
        gradients_of = _derived if torch.is_grad_enabled() else _recomputed
        outside = ThreadState()
        ctx.state.enter()
        try:
            with unwatched(), BlockDropout(given.shape[-2], ctx.masks) as dropout:
                of_input, found = gradients_of(
                    ctx.call, given, gradients[0], dropout=dropout, inward=asked[0], numbers=numbers
                )
        finally:
            outside.enter()
        return (None, None, None, of_input, *(found.get(number) for number in ctx.used))


_Found = tuple[Tensor | None, dict[int, Tensor]]


def _recomputed(
    call: Pointwise, given: Tensor, gradient: Tensor, *, dropout: BlockDropout, inward: bool, numbers: Sequence[int]
) -> _Found:
    """Gradients of the input and of parameters by number, block by block."""
    of_input = torch.zeros_like(given) if inward else None
    totals: dict[int, Tensor] = {}
    with aliases(call.places, numbers) as leaves, torch.enable_grad():
        for block in call.blocks(given):
            dropout.at(block)
            part = given.detach()[..., block, :].contiguous().requires_grad_(inward)
            inputs = [*([part] if inward else []), *(leaves[number] for number in numbers)]
            parts = list(torch.autograd.grad(call(part), inputs, gradient[..., block, :], allow_unused=True))
            if of_input is not None and (mine := parts.pop(0)) is not None:
                of_input[..., block, :] = mine
            for number, each in zip(numbers, parts, strict=True):
                if each is not None:
                    totals[number] = totals[number].add_(each) if number in totals else _wide(each)
    return of_input, {number: total.to(leaves[number].dtype) for number, total in totals.items()}


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _derived(
    call: Pointwise, given: Tensor, gradient: Tensor, *, dropout: BlockDropout, inward: bool, numbers: Sequence[int]
) -> _Found:
    """The same gradients with a history, from all positions at once."""
    dropout.at(slice(0, given.shape[-2]))
    known = [each for each, _ in call.places]
    inputs = [*([given] if inward else []), *(known[number] for number in numbers)]
    found = list(torch.autograd.grad(call(given), inputs, gradient, create_graph=True, allow_unused=True))
    of_input = found.pop(0) if inward else None
    return of_input, {number: each for number, each in zip(numbers, found, strict=True) if each is not None}
