"""`cp_kind: auto` follows the formulas, and says so."""

import pytest

from meshwright.parallel.context.choose import Links, choose
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.kinds import Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.context.traffic import Shape, traffic_of

LLAMA = Shape(batch=1, length=65536, heads=32, kv_heads=8, width=128)
FAST = Links(ranks_per_node=8, inside_bytes_per_s=3e11, between_bytes_per_s=2.5e10, flops_per_s=4e14)


def _shape(heads: int, kv_heads: int, length: int = 65536) -> Shape:
    return Shape(batch=1, length=length, heads=heads, kv_heads=kv_heads, width=128)


@pytest.mark.parametrize(
    ("shape", "degree", "kind"),
    [
        (LLAMA, 8, Ulysses()),
        (_shape(5, 5), 2, Ring()),  # heads are not dealt evenly
        (_shape(4, 4), 8, Hybrid(4)),  # more ranks than heads
        (_shape(28, 4), 8, Hybrid(4)),  # 28 heads over 8 ranks are uneven, over 4 they are not
        (_shape(8, 3), 2, Ring()),
        (_shape(64, 1), 2, Ring()),  # one key head is little to send around
    ],
    ids=str,
)
def test_without_speeds_the_fewest_bytes_win(shape: Shape, degree: int, kind: Kind) -> None:
    assert choose(shape, degree).kind == kind


@pytest.mark.parametrize("degree", [2, 4, 8, 16])
def test_the_bytes_named_are_those_of_the_formulas(degree: int) -> None:
    choice = choose(LLAMA, degree)
    dealing = Dealing("zigzag", degree)
    sent = sum(traffic_of(LLAMA, dealing, choice.kind, rank=0, backward=back).sent_bytes(2) for back in (False, True))
    assert f"sends {sent / 1e6:,.1f} MB per attention and rank" in choice.reason


def test_a_ring_that_hides_behind_compute_beats_an_exchange_between_nodes() -> None:
    assert choose(_shape(64, 8, 1 << 20), 64, links=FAST).kind in (Ring(), Hybrid(2), Hybrid(4), Hybrid(8))
    assert choose(_shape(64, 64, 1024), 8, links=FAST).kind == Ulysses()  # too short to hide anything
    slow = Links(ranks_per_node=1, inside_bytes_per_s=3e11, between_bytes_per_s=1e9, flops_per_s=1e12)
    assert choose(_shape(8, 8, 1 << 17), 8, links=slow).kind == Ring()


def test_the_reason_names_what_was_not_chosen_and_why() -> None:
    reason = choose(_shape(4, 2), 8).reason
    assert reason.startswith("hybrid over groups of 2: sends ")
    assert "; ring " in reason
    assert reason.endswith("4 heads (2 of keys) are not dealt evenly over 8 ranks")
    assert "waits for links " in choose(LLAMA, 8, links=FAST).reason
