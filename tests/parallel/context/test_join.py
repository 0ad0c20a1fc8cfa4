"""Positions put together, and known by their order alone, are the same positions."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as some

from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.join import Pieces, join_pieces
from meshwright.parallel.context.ranked import ranked

DEALT = some.sampled_from(["contiguous", "zigzag", "striped"])


def _flat(pieces: Pieces) -> list[int]:
    return [position for piece in pieces for position in piece]


@given(DEALT, some.integers(1, 6), some.integers(0, 40), some.data())
def test_every_position_has_its_place(dealt: Any, degree: int, length: int, data: Any) -> None:
    first = data.draw(some.integers(0, degree - 1))
    last = data.draw(some.integers(first, degree - 1))
    dealing = Dealing(dealt, degree)
    ranks = [dealing.pieces(length, rank) for rank in range(first, last + 1)]
    joined = join_pieces(ranks)
    together = _flat(joined.pieces)
    for own, places, size in zip(ranks, joined.places, joined.sizes, strict=True):
        assert [position for place in places for position in together[place]] == _flat(own)
        assert size == len(_flat(own))
    assert sorted(together) == sorted(position for own in ranks for position in _flat(own))
    if (first, last) == (0, degree - 1) and length:
        assert joined.pieces == (range(length),)


def test_neighbours_of_a_zigzag_meet_in_two_ranges() -> None:
    dealing = Dealing("zigzag", 8)
    assert join_pieces([dealing.pieces(64, rank) for rank in (2, 3)]).pieces == (range(8, 16), range(48, 56))


@given(DEALT, some.integers(1, 6), some.integers(1, 40), some.data())
def test_order_stays_where_gaps_go(dealt: Any, degree: int, length: int, data: Any) -> None:
    dealing = Dealing(dealt, degree)
    queries, keys = (dealing.pieces(length, data.draw(some.integers(0, degree - 1))) for _ in range(2))
    for found, before in zip(ranked(queries, keys), (queries, keys), strict=True):
        assert len(found) <= len(before)
    one, other = (_flat(each) for each in ranked(queries, keys))
    for here, query in zip(one, _flat(queries), strict=True):
        for there, key in zip(other, _flat(keys), strict=True):
            assert (there <= here) == (key <= query)


def test_a_zigzag_rank_is_one_range_to_any_keys() -> None:
    dealing = Dealing("zigzag", 4)
    for origin in range(4):
        queries, _ = ranked(dealing.pieces(64, 1), dealing.pieces(64, origin))
        assert len(queries) == (2 if origin > 1 else 1)
