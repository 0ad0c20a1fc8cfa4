"""A block of a model run by spans: of its inside only what attention gave is kept (arXiv 2305.19370, fused form)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from meshwright.parallel.blockwise.aliases import places_of
from meshwright.parallel.blockwise.calls import has_hooks
from meshwright.parallel.spans.answers import Answers
from meshwright.parallel.spans.arguments import Arguments, Dims, Key
from meshwright.parallel.spans.call import SpanCall
from meshwright.parallel.spans.joining import Spans
from meshwright.parallel.spans.run import run_by_spans
from meshwright.parallel.unit_run import Kinds, argument, kinds_of

__all__ = ["SpannedBlock"]


@dataclass(eq=False)
class SpannedBlock:
    """The forward of a block that runs by spans.

    Attributes:
        name: path, for messages.
        module: the block.
        forward: its own.
        stream: the argument [samples, positions, features].
        dims: of positions, of what has an entry for each.
        kinds: of the arguments it is known to work by position with.
        most: positions of a span.
        answers: of its attention.
        uses: how it ran -> how often.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    stream: Key
    dims: Dims
    kinds: Kinds
    most: int
    answers: Answers
    uses: Counter[str] = field(default_factory=Counter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output; what it was not tried with, and hooks on inner modules, make it run as a whole."""
        if kinds_of(args, kwargs) != self.kinds or has_hooks(self.module):
            self.uses["whole"] += 1
            return self.forward(*args, **kwargs)
        self.uses["by spans"] += 1
        full = argument(args, kwargs, self.stream).shape[-2]
        arguments, tensors = Arguments.of(args, kwargs, dims=self.dims, full=full)
        spans, places = Spans(full, self.most), places_of([self.module])
        return run_by_spans(
            SpanCall(self.name, self.module, self.forward, self.answers, arguments, spans, places), tensors
        )
