"""What `cp_kind` comes to for a model."""

import pytest

from meshwright.parallel.context.chosen import ContextKind, way_of
from meshwright.parallel.context.kinds import GatherKV, Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.context.plan import Attends
from meshwright.parallel.errors import WrapError

WIDE = {"layers.0": Attends(True, 32, 8, 128)}


@pytest.mark.parametrize(
    ("asked", "kind", "dealing"),
    [
        ("ring", Ring(), "zigzag"),
        ("gather", GatherKV(), "zigzag"),
        ("ulysses", Ulysses(), "contiguous"),
        ("hybrid", Hybrid(2), "zigzag"),
        ("auto", Ulysses(), "contiguous"),
    ],
)
def test_a_kind_brings_the_dealing_that_balances_it(asked: ContextKind, kind: Kind, dealing: str) -> None:
    way = way_of(asked, WIDE, degree=4, tp=1)
    assert (way.kind, way.dealing) == (kind, dealing)


def test_heads_that_tp_deals_are_not_there_for_cp() -> None:
    few = {"layers.0": Attends(True, 4, 4, 64)}
    assert way_of("auto", few, degree=4, tp=1).kind == Ulysses()
    assert way_of("auto", few, degree=4, tp=4).kind == Ring()


def test_the_reason_says_what_each_kind_would_send() -> None:
    assert "ring" in way_of("auto", WIDE, degree=4, tp=1).reason


def test_a_hybrid_that_no_group_fits_is_refused() -> None:
    with pytest.raises(WrapError, match="cp_kind='hybrid'"):
        way_of("hybrid", {"layers.0": Attends(True, 3, 3, 64)}, degree=4, tp=1)


def test_models_whose_attention_runs_whole_need_no_kind() -> None:
    assert way_of("auto", {"layers.0": Attends(False, 4, 4, 64)}, degree=2, tp=1).dealing == "contiguous"
