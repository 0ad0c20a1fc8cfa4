"""Forward of a block by spans: up to each attention, attention for the whole sequence, and on with what it gave."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.errors import WrapError
from meshwright.parallel.spans.call import Visit
from meshwright.parallel.spans.joining import put_span

__all__ = ["Kept", "Output", "run_forward"]

_HERE = object()  # a tensor


class Kept(NamedTuple):
    """What an attention gave: [b, heads, s, d_v] and the log-sum-exp [b, heads, s]."""

    out: Tensor
    lse: Tensor

    def at(self, span: slice) -> Tensor:
        """The answer for a span."""
        return self.out[:, :, span]


class Output:
    """What a block gives, put together from spans.

    Args:
        full: length of the sequence.
    """

    def __init__(self, full: int) -> None:
        self.tensors: list[Tensor] = []
        self._full = full
        self._leaves: list[Any] = []
        self._structure: TreeSpec | None = None

    def add(self, output: Any, span: slice, name: str) -> None:
        """Takes what a span gave.

        Raises:
            WrapError: for spans that give different structures, or something that is not about positions.
        """
        leaves, structure = tree_flatten(output)
        parts = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        size = span.stop - span.start
        odd = next((tuple(each.shape) for each in parts if each.shape[-2:-1] != (size,)), None)
        if odd is not None or structure != (self._structure or structure):
            raise WrapError(
                f"{name} gives {odd or structure} for {size} positions, which it did not with the example; pass an "
                "example= like the batches to come, or leave out layer_block"
            )
        self._structure = structure
        self._leaves = self._leaves or [_HERE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        so_far: list[Tensor | None] = [*self.tensors] or [None] * len(parts)
        self.tensors = [
            put_span(whole, part, span, full=self._full, dim=part.dim() - 2)
            for whole, part in zip(so_far, parts, strict=True)
        ]

    def taken(self) -> tuple[Tensor, ...]:
        """Its tensors, which are not kept."""
        tensors, self.tensors = tuple(self.tensors), []
        return tensors

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The output with these tensors for its own."""
        assert self._structure is not None, "no span was run"
        given = iter(tensors)
        return tree_unflatten([next(given) if leaf is _HERE else leaf for leaf in self._leaves], self._structure)


def run_forward(visit: Visit, output: Output) -> list[Kept]:
    """Puts what the block gives into `output`; returns what each attention gave. Without a history."""
    call, kept = visit.call, list[Kept]()
    while True:
        number, reached = len(kept), 0
        for span, given in visit:
            found, asked = visit.run(given, [each.at(span) for each in kept])
            if len(asked) > number:
                reached += 1
                visit.join(number, asked[number], span)
            else:
                output.add(found, span, call.name)
        if not reached:
            return kept
        if reached != len(call.spans):
            raise WrapError(f"{call.name} attends for some positions and not for others; leave out layer_block")
        whole, _ = visit.joined.pop(number).whole()
        options = visit.keywords(number, whole)
        kept.append(Kept(*attend(whole.query, whole.key, whole.value, with_lse=True, **options)))
