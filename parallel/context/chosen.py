"""How the ranks of `cp` share attention, as an option says or as the formulas of traffic do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.parallel.context.choose import choose, hybrids
from meshwright.parallel.context.dealing import DealingKind
from meshwright.parallel.context.kinds import GatherKV, Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.context.plan import Attends
from meshwright.parallel.context.traffic import Shape
from meshwright.parallel.errors import WrapError

__all__ = ["ContextKind", "ContextWay", "way_of"]

ContextKind = Literal["auto", "ring", "ulysses", "hybrid", "gather"]
_LENGTH = 1 << 16  # bytes are proportional to it, so it decides nothing


@dataclass(frozen=True)
class ContextWay:
    """How keys and queries meet, which positions each rank has, and why."""

    kind: Kind
    dealing: DealingKind
    reason: str


def way_of(asked: ContextKind, attends: Mapping[str, Attends], *, degree: int, tp: int) -> ContextWay:
    """What an option comes to for a model.

    Args:
        asked: the option.
        attends: attention modules of the whole model.
        degree: of `cp`.
        tp: over which heads are dealt besides.

    >>> way_of("auto", {"layers.0": Attends(True, 32, 8, 128)}, degree=4, tp=1).kind
    Ulysses()

    Raises:
        WrapError: for groups of ranks that cannot be made.
    """
    dealt = [each for each in attends.values() if each.dealt]
    if not dealt:
        return ContextWay(Ring(), "contiguous", "no attention fetches keys of other ranks")
    heads, kv_heads = -(-dealt[0].heads // tp), -(-dealt[0].kv_heads // tp)
    shape = Shape(batch=1, length=_LENGTH, heads=heads, kv_heads=kv_heads, width=dealt[0].width)
    kind, reason = _kind_of(asked, shape, degree)
    return ContextWay(kind, "contiguous" if isinstance(kind, Ulysses) else "zigzag", reason)


def _kind_of(asked: ContextKind, shape: Shape, degree: int) -> tuple[Kind, str]:
    if asked == "auto":
        choice = choose(shape, degree)
        return choice.kind, choice.reason
    if asked == "hybrid":
        found = hybrids(shape, degree)
        if not found:
            raise WrapError(
                f"cp_kind='hybrid' needs groups of several ranks, not all of cp={degree}, that {shape.heads} heads "
                f"({shape.kv_heads} of keys) are dealt evenly over; use cp_kind='auto'"
            )
        return Hybrid(found[-1]), "asked for"
    named: dict[str, Kind] = {"ring": Ring(), "ulysses": Ulysses(), "gather": GatherKV()}
    assert set(named) | {"auto", "hybrid"} == set(get_args(ContextKind))
    return named[asked], "asked for"
