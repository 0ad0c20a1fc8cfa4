"""What context parallelism does to a model, as one value: made once, printed, applied."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["Attends", "ContextPlan", "Dealt"]

Dealt = tuple[tuple[int | str, tuple[int | None, ...]], ...]
"""(argument, for each tensor in it its dim of positions, from the end, or None), ..."""


@dataclass(frozen=True)
class Attends:
    """An attention whose queries are a rank's positions.

    Args:
        dealt: whether keys are dealt as queries are; otherwise every rank has all of them.
        heads: of queries, of the whole model.
        kv_heads: of keys.
        width: of a key.
    """

    dealt: bool
    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ContextPlan(TensorPlan):
    """Placements of one model along `cp`.

    Attributes:
        dealt: unit -> arguments besides the stream that have an entry for each position.
        entered: unit -> arguments with a history that it takes whole; their gradients are summed.
        attends: attention module -> how it does.
    """

    dealt: Mapping[str, Dealt] = field(default_factory=dict)
    entered: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    attends: Mapping[str, Attends] = field(default_factory=dict)

    def per_module(self) -> tuple[str, ...]:
        """Names of the attributes that are about modules or parameters by path."""
        return (*super().per_module(), "dealt", "entered", "attends")
