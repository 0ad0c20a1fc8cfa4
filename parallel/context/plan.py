"""What context parallelism does to a model, as one value: made once, printed, applied."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["Attends", "ContextPlan", "Dealt", "Scored", "Seen"]

Dealt = tuple[tuple[int | str, tuple[int | None, ...]], ...]
"""(argument, for each tensor in it its dim of positions, from the end, or None), ..."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an attention was given in the example.

    Args:
        batch: samples.
        length: positions of the whole sequence.
        value_width: of a value.
        window: keys before and after a query that it sees, None for no limit; None for a mask that only values tell.
        biased: whether scores are added to that differ between queries.
        learned: whether anything has a gradient.
        times: calls in one forward pass.
    """

    batch: int
    length: int
    value_width: int
    window: tuple[int | None, int | None] | None = (None, None)
    biased: bool = False
    learned: bool = True
    times: int = 1


@dataclass(frozen=True)
class Scored:
    """A cross entropy that the model computed in the example.

    Args:
        rows: of scores.
        classes: of each row.
        reduced: to one number.
    """

    rows: int
    classes: int
    reduced: bool


@dataclass(frozen=True)
class Attends:
    """An attention whose queries are a rank's positions.

    Args:
        dealt: whether keys are dealt as queries are; otherwise every rank has all of them.
        heads: of queries, of the whole model.
        kv_heads: of keys.
        width: of a key.
        seen: the rest of it, for predictions.
    """

    dealt: bool
    heads: int
    kv_heads: int
    width: int
    seen: Seen | None = None


@dataclass(frozen=True, kw_only=True)
class ContextPlan(TensorPlan):
    """Placements of one model along `cp`.

    Attributes:
        dealt: unit -> arguments besides the stream that have an entry for each position.
        entered: unit -> arguments with a history that it takes whole; their gradients are summed.
        attends: attention module -> how it does; their own collectives are not among `calls`.
        lengths: unit -> positions of its sequence in the example.
        losses: cross entropies in the example.
    """

    dealt: Mapping[str, Dealt] = field(default_factory=dict)
    entered: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    attends: Mapping[str, Attends] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    losses: tuple[Scored, ...] = ()

    def per_module(self) -> tuple[str, ...]:
        """Names of the attributes that are about modules or parameters by path."""
        return (*super().per_module(), "dealt", "entered", "attends", "lengths")
