"""One call of a block that is run by spans, as a value."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from meshwright.parallel.blockwise.aliases import Places
from meshwright.parallel.blockwise.answer import keywords_of
from meshwright.parallel.blockwise.attention import AttendKeywords
from meshwright.parallel.blockwise.block_dropout import BlockDropout
from meshwright.parallel.blockwise.calls import AttentionCall, called
from meshwright.parallel.errors import WrapError
from meshwright.parallel.spans.answers import Answers, Drops, ReachedError
from meshwright.parallel.spans.arguments import Arguments, Given
from meshwright.parallel.spans.joining import Joining, Spans

__all__ = ["SpanCall", "Visit"]


@dataclass(frozen=True, eq=False)
class SpanCall:
    """What is run.

    Args:
        name: of the block, for messages.
        module: the block.
        forward: its own.
        answers: what its attention asks.
        arguments: of the call, without their tensors.
        spans: of the sequence.
        places: parameters of the block.
        masks: of dropouts, where they cannot be drawn again.
        heads: the first of each attention, once it is known.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    answers: Answers
    arguments: Arguments
    spans: Spans
    places: Places
    masks: list[Tensor] | None = None
    heads: Sequence[int] = ()

    @property
    def trained(self) -> list[int]:
        """Numbers of the parameters that take gradients."""
        return [number for number, (each, _) in enumerate(self.places) if each.requires_grad]


class Visit:
    """The spans of a call, run one after the other, as often as asked; what is random is drawn once.

    Args:
        call: what is run.
        tensors: of its arguments, whole.
        learned: which of them want gradients.
        dropout: of the call; where the first span drops nothing, the others run without, since it takes time.

    Attributes:
        tensors: the same.
        learned: the same.
        joined: number of an attention -> its calls so far.
    """

    def __init__(
        self, call: SpanCall, tensors: Sequence[Tensor], learned: Sequence[bool], *, dropout: BlockDropout
    ) -> None:
        self.call = call
        self.drops = Drops(heads=list(call.heads))
        self.joined: dict[int, Joining] = {}
        self._mode: AbstractContextManager[object] = dropout
        self.tensors, self.learned, self._dropout = tensors, learned, dropout

    def __iter__(self) -> Iterator[tuple[slice, Given]]:
        """Each span and the arguments for it.

        Raises:
            WrapError: for a block that draws random bits that are no dropout.
        """
        first: tuple[bytes, ...] | None = None
        for span in self.call.spans:
            self._dropout.at(span)
            self._mode = self._dropout if first is None or self._dropout.masks else nullcontext()
            yield span, self.call.arguments.at(span, self.tensors, self.learned)
            state = _random_state()
            if first is not None and first != state:
                raise WrapError(
                    f"{self.call.name} draws random bits beside dropout, which would differ from span to span; leave "
                    "out layer_block"
                )
            first = state

    def run(self, given: Given, known: Sequence[Tensor]) -> tuple[Any, list[AttentionCall]]:
        """What the block gives for a span, or None where it came to an attention past the `known` answers.

        With its attention calls, that one included.
        """
        call, asked = self.call, list[AttentionCall]()
        with self._mode, call.answers.given(known, self.drops, asked), called(call.module):
            try:
                return call.forward(*given.args, **given.kwargs), asked
            except ReachedError:
                return None, asked

    def join(self, number: int, asked: AttentionCall, span: slice) -> None:
        """Takes an attention call of a span, for the whole of it."""
        if number not in self.joined:
            self.joined[number] = Joining(self.call.spans.full, dealt=self.call.answers.is_dealt(asked.name))
        self.joined[number].add(asked, span)

    def keywords(self, number: int, whole: AttentionCall) -> AttendKeywords:
        """What is said of an attention besides its tensors; it drops by the seed that its first span drew."""
        options = keywords_of(whole, self.call.answers.sizes)
        options["dropout_seed"], options["first_head"] = self.drops.seeds[number], self.drops.heads[number]
        return options


def _random_state() -> tuple[bytes, ...]:
    """Of the generators, which have one where tensors have no values, too."""
    with unset_fake_temporarily():
        states = [torch.default_generator.get_state()]
        if torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state())
        return tuple(each.numpy().tobytes() for each in states)
