"""Which positions of a sequence each rank holds."""

import pytest

from meshwright.parallel.context.dealing import Dealing, DealingKind
from meshwright.parallel.errors import WrapError

KINDS: tuple[DealingKind, ...] = ("contiguous", "zigzag", "striped")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", [1, 2, 3, 8])
@pytest.mark.parametrize("full", [0, 1, 5, 16, 129])
def test_every_position_is_held_once_and_each_rank_has_its_own_in_order(
    kind: DealingKind, degree: int, full: int
) -> None:
    dealing = Dealing(kind, degree)
    held = [[each for piece in dealing.pieces(full, rank) for each in piece] for rank in range(degree)]
    assert sorted(each for mine in held for each in mine) == list(range(full))
    assert all(mine == sorted(mine) for mine in held)
    assert dealing.sizes(full) == [len(mine) for mine in held]
    assert all(len(piece) for rank in range(degree) for piece in dealing.pieces(full, rank))


def test_zigzag_gives_a_rank_an_early_and_a_late_chunk() -> None:
    assert Dealing("zigzag", 2).pieces(8, 0) == (range(2), range(6, 8))


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(WrapError, match="zigzag"):
        Dealing("zig-zag", 2)  # type: ignore[arg-type]
