"""What attention inside of a block gets for an answer while the block runs on one span."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from meshwright.parallel.blockwise.answer import attend_to, first_head_of
from meshwright.parallel.blockwise.attention import draw_seed
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.plan import Attends

__all__ = ["Answers", "Drops", "ReachedError"]


class ReachedError(BaseException):
    """A run came to the attention at which it was to end; no error that a model may catch."""


@dataclass
class Drops:
    """Of each attention the seed of its dropout, drawn where the first span comes to it, and its first head.

    Backward draws again, so that what follows finds the generator as it was, and is told of the heads.
    """

    seeds: list[int | None] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)

    def at(self, number: int, asked: AttentionCall) -> None:
        """Finds out what is not known of an attention."""
        if number == len(self.heads):
            self.heads.append(first_head_of(asked, asked.key.shape[2]))
        if number == len(self.seeds):
            self.seeds.append(draw_seed() if asked.dropout_p else None)


class Answers:
    """Answers calls of one block.

    Args:
        attends: attention module -> how it does; calls of others are computed.
        sizes: of attention's blocks.
    """

    def __init__(self, attends: Mapping[str, Attends], sizes: Blockwise) -> None:
        self._attends = attends
        self._sizes = sizes
        self._known: Sequence[Tensor] | None = None
        self._drops, self._asked = Drops(), list[AttentionCall]()

    def __call__(self, asked: AttentionCall) -> Tensor:
        """The known answer of this call.

        Raises:
            ReachedError: where there is none.
        """
        if self._known is None or asked.name not in self._attends:
            return attend_to(asked, self._sizes)
        number = len(self._asked)
        self._asked.append(asked)
        self._drops.at(number, asked)
        if number == len(self._known):
            raise ReachedError(asked.name)
        return self._known[number]

    def is_dealt(self, name: str) -> bool:
        """Whether the keys of an attention are dealt as its queries are."""
        return self._attends[name].dealt

    @property
    def sizes(self) -> Blockwise:
        """Of attention's blocks."""
        return self._sizes

    @contextmanager
    def given(self, known: Sequence[Tensor], drops: Drops, asked: list[AttentionCall]) -> Iterator[None]:
        """Inside, the first calls have these answers, and the next one ends the run; all are put in `asked`."""
        self._known, self._drops, self._asked = known, drops, asked
        try:
            yield
        finally:
            self._known, self._asked = None, []
