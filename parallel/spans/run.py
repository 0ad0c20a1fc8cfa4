"""A block run by spans, for autograd: of its inside only what attention gave is kept (arXiv 2305.19370, fused form).

Forward runs the block on one span after the other up to its attention, attends once for the whole sequence, and runs
each span again with the answer, to the end or to the next attention. Backward runs it once more for each span, from its
output back to the answers; goes back through attention, from what it gave, which is kept; and then through what is
ahead of it, span by span. So everything wide exists for one span, attention is computed once, and what is kept is the
input, and attention's output with one number for each of its rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.autograd.function import Function

from meshwright.parallel.blockwise.aliases import aliases, check_versions, versions_of
from meshwright.parallel.blockwise.block_dropout import BlockDropout
from meshwright.parallel.blockwise.head import unwatched
from meshwright.parallel.blockwise.wanted import wanted
from meshwright.parallel.spans.backward import Wish, run_at_once, run_backward
from meshwright.parallel.spans.call import SpanCall, Visit
from meshwright.parallel.spans.forward import Kept, Output, run_forward
from meshwright.parallel.thread_state import ThreadState

__all__ = ["run_by_spans"]


def run_by_spans(call: SpanCall, tensors: Sequence[Tensor]) -> Any:
    """The block's output.

    Args:
        call: what is run.
        tensors: of its arguments.

    Raises:
        WrapError: for a block that does not do on a span what it did with the example, and in backward, when parameters
            were changed since.
    """
    output = Output(call.spans.full)
    parameters = (call.places[number][0] for number in call.trained)
    made = _BySpans.apply((call, output, ThreadState()), *tensors, *parameters)  # type: ignore[no-untyped-call]
    return output.filled(made)


class _BySpans(Function):
    @staticmethod
    def forward(ctx: Any, begin: tuple[SpanCall, Output, ThreadState], *inputs: Tensor) -> tuple[Tensor, ...]:
        call, output, state = begin
        tensors = inputs[: len(call.arguments.dims)]
        dropout = BlockDropout(call.spans.full)
        visit = Visit(call, tensors, [False] * len(tensors), dropout=dropout)
        with aliases(call.places, []):
            kept = run_forward(visit, output)
        masks = dropout.masks if dropout.kept else []
        ctx.call, ctx.num_masks = replace(call, heads=visit.drops.heads), len(masks)
        ctx.state, ctx.versions = state, versions_of(call.places)
        ctx.save_for_backward(*tensors, *(each for pair in kept for each in pair), *masks)
        ctx.set_materialize_grads(False)
        return output.taken()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        check_versions(ctx.call.name, ctx.versions, "leave out layer_block")
        saved = ctx.saved_tensors
        number, end = len(ctx.call.arguments.dims), len(saved) - ctx.num_masks
        call: SpanCall = replace(ctx.call, masks=list(saved[end:]))
        kept = [Kept(*saved[at : at + 2]) for at in range(number, end, 2)]
        asked = wanted(ctx, [False, *[True] * (number + len(call.trained))])[1:]
        numbers = [each for each, need in zip(call.trained, asked[number:], strict=True) if need]
        wish = Wish(asked[:number], numbers)
        outside = ThreadState()
        ctx.state.enter()
        try:
            with unwatched():
                if outside.grad:
                    found = run_at_once(call, saved[:number], gradients=gradients, wish=wish)
                else:
                    found = run_backward(call, saved[:number], kept, gradients=gradients, wish=wish)
        finally:
            outside.enter()
        return None, *found.tensors, *(found.parameters.get(each) for each in call.trained)
