"""Numbers of loads, against values worked out by hand."""

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.errors import MetricsError
from meshwright.moe.load import Load

COUNTS = some.lists(some.integers(0, 10**12), min_size=1, max_size=12)


def test_numbers_worked_out_by_hand() -> None:
    load = Load((4, 2, 0, 2), num_nodes=2)
    assert load.num_rows == 8
    assert load.shares == (0.5, 0.25, 0.0, 0.25)
    assert load.ratios == (2.0, 1.0, 0.0, 1.0)
    assert (load.worst_ratio, load.busiest, load.dead) == (2.0, 0, (2,))
    assert (load.node_counts, load.node_shares, load.worst_node_ratio) == ((6, 2), (0.75, 0.25), 1.5)
    assert load.entropy_nats == pytest.approx(1.5 * log(2), rel=1e-15)
    assert load.most_entropy_nats == log(4)


def test_experts_lie_on_nodes_in_order() -> None:
    assert Load((1, 2, 3, 4, 5, 6), num_nodes=2).node_counts == (6, 15)
    assert Load((1, 2, 3, 4, 5, 6), num_nodes=3).node_counts == (3, 7, 11)
    assert Load((1, 2, 3)).node_counts == (6,)


@pytest.mark.parametrize("number", [1, 3, 7, 49, 160, 257])
def test_an_even_load_is_exactly_even(number: int) -> None:
    load = Load((13,) * number, num_nodes=number)
    assert load.worst_ratio == load.worst_node_ratio == 1.0
    assert exp(load.entropy_nats) == pytest.approx(number, rel=1e-12)
    assert load.dead == ()


def test_all_rows_on_one_expert_is_the_worst() -> None:
    load = Load((0, 0, 9, 0, 0, 0), num_nodes=3)
    assert (load.worst_ratio, load.worst_node_ratio, load.entropy_nats) == (6.0, 3.0, 0.0)
    assert load.dead == (0, 1, 3, 4, 5)


def test_an_expert_with_a_single_row_is_not_dead() -> None:
    assert Load((1, 0, 7)).dead == (1,)


def test_one_expert_has_nothing_to_balance() -> None:
    assert Load((5,)).as_dict() == {
        "rows": 5,
        "worst_expert_ratio": 1.0,
        "worst_node_ratio": 1.0,
        "dead_experts": 0,
        "load_entropy_nats": 0.0,
        "most_load_entropy_nats": 0.0,
    }


def test_without_rows_all_is_zero_and_every_expert_dead() -> None:
    load = Load((0, 0), num_nodes=2)
    assert load.shares == load.node_shares == load.ratios == (0.0, 0.0)
    assert (load.worst_ratio, load.worst_node_ratio, load.entropy_nats, load.dead) == (0.0, 0.0, 0.0, (0, 1))


@given(COUNTS)
def test_shares_make_one_and_entropy_and_ratio_stay_within_bounds(counts: list[int]) -> None:
    load = Load(tuple(counts))
    assert sum(load.shares) == pytest.approx(1.0 if sum(counts) else 0.0)
    assert -1e-12 <= load.entropy_nats <= load.most_entropy_nats + 1e-12
    assert load.worst_ratio == 0.0 or 1.0 <= load.worst_ratio <= len(counts)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(MetricsError, match="6 experts do not lie evenly on 4 nodes; choose from: 1, 2, 3, 6"):
        Load((1,) * 6, num_nodes=4)
    with pytest.raises(MetricsError, match="on 0 nodes"):
        Load((1,), num_nodes=0)
    with pytest.raises(MetricsError, match=r"loads \[3, -1\]: give the rows of each expert, 0 or more"):
        Load((3, -1))
    with pytest.raises(MetricsError, match=r"loads \[\]"):
        Load(())
