"""Which cells of a product `make test` runs: a design that covers every pair that counts. `make wide` runs the others.

A cell is a row of parameters. A mesh or a set of options in it counts key by key, anything else (a family, a model) by
its place. `make test` holds, of all that the table holds:

- every value at least once,
- every family on every axis,
- every two of axes, schedules and options together, and every set of axes that meet on one mesh.

A family under each single option is left to `make wide`: what an option changes does not look at the family.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from math import prod
from typing import Any

import pytest

from meshwright.parallel.mesh import Mesh

__all__ = ["cover", "demands", "layout_of", "tiered"]

AXES = frozenset(Mesh.__dataclass_fields__)


def layout_of(cell: Sequence[Any]) -> Sequence[Any]:
    """What counts of a cell whose family is only there to have one."""
    return cell[1:]


def tiered(cells: Iterable[Any], seen: Callable[[Any], Any] = lambda cell: cell) -> list[Any]:
    """Parameters for all cells; those that the cover does without carry the marker `wide`.

    Args:
        cells: rows of parameters, or single ones.
        seen: what counts of a cell, where its parameters are only names.
    """
    given = list(cells)
    kept = cover([seen(each) for each in given])
    rows = (each if isinstance(each, tuple) else (each,) for each in given)
    return [pytest.param(*row, marks=[] if i in kept else [pytest.mark.wide]) for i, row in enumerate(rows)]


def cover(cells: Sequence[Any]) -> frozenset[int]:
    """Places of few cells that meet all demands of all: each time the first that meets most of those left per rank.

    A rank is a process, and eight of them take ten times as long as two.

    >>> sorted(cover([("a", {"dp": 2}), ("a", {"tp": 2}), ("a", {"dp": 2, "tp": 2}), ("b", {"tp": 2})]))
    [0, 2, 3]
    >>> sorted(cover([("a", {"n": 1}), ("a", {"n": 2}), ("b", {"n": 1}), ("b", {"n": 2})]))
    [0, 3]
    """
    wanted, ranks = [demands(each) for each in cells], [_ranks(each) for each in cells]
    left = set().union(*wanted)
    kept: list[int] = []
    while left:
        most = max(range(len(cells)), key=lambda i: (len(wanted[i] & left) / ranks[i], -i))
        kept.append(most)
        left -= wanted[most]
    return frozenset(_without_spare(sorted(kept, key=lambda i: -ranks[i]), wanted))


def _ranks(cell: Any) -> int:
    return prod(int(value) for kind, _, value in _values(cell) if kind == "axis" and value.isdecimal())


def _without_spare(kept: list[int], wanted: list[set[Hashable]]) -> list[int]:
    """Without those whose demands the others meet as well, the dearest first."""
    for each in list(kept):
        others = set().union(*(wanted[i] for i in kept if i != each))
        if wanted[each] <= others:
            kept = [i for i in kept if i != each]
    return kept


def demands(cell: Any) -> set[Hashable]:
    """What a test of this cell shows: values, pairs of them, and the set of axes that meet."""
    values = list(dict.fromkeys(_values(cell)))
    axes = [each for each in values if each[0] == "axis"]
    families = [each for each in values if each[0] == "family"]
    ways = [each for each in values if each[0] != "family"]
    names = frozenset(name for _, name, _ in axes)
    pairs = [*combinations(ways, 2), *((family, ("axis", name)) for family in families for name in names)]
    return {*values, *map(frozenset, pairs), ("meet", names)}


def _values(part: Any, place: tuple[int, ...] = ()) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(part, dict):
        for name, value in part.items():
            yield ("axis" if name in AXES else "option", name, repr(value))
    elif isinstance(part, (tuple, list)):
        for i, each in enumerate(part):
            yield from _values(each, (*place, i))
    else:
        yield ("family", place, repr(part))
