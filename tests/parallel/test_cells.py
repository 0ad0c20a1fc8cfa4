"""The part of a matrix that `make test` runs holds every pair that counts, and no cell for nothing."""

from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.parallel.cells import cover, demands, layout_of, tiered
from tests.parallel.matrix import FAMILIES, WHOLE
from tests.parallel.schedules_matrix import DEEP, layouts

AXES = ("dp", "fsdp", "tp", "pp", "cp", "ep")
meshes = some.dictionaries(some.sampled_from(AXES), some.sampled_from([2, 4]), max_size=3)
ways = some.dictionaries(some.sampled_from(["schedule", "parts", "stage"]), some.integers(1, 3), max_size=3)
tables = some.lists(some.tuples(some.sampled_from("abcd"), meshes, ways), min_size=1, max_size=40)


def _met(cells: list[Any]) -> set[Any]:
    return set().union(*map(demands, cells))


@given(tables)
def test_every_demand_of_all_cells_is_met_by_those_that_are_kept(cells: list[Any]) -> None:
    kept = [cells[place] for place in sorted(cover(cells))]
    assert _met(kept) == _met(cells)
    assert all(_met([other for j, other in enumerate(kept) if j != i]) < _met(cells) for i in range(len(kept)))
    assert cover(cells) == cover(cells), "on every worker the same"


def test_a_cell_that_was_chosen_first_goes_where_those_after_it_show_all_it_does() -> None:
    cells = [("a", {}, {"y": 1, "x": 2}), ("a", {}, {"y": 2, "x": 2}), ("b", {}, {"x": 2, "y": 1}), ("b", {}, {})]
    assert sorted(cover(cells)) == [1, 2]


def test_what_a_cell_shows() -> None:
    found = demands(("llama", {"tp": 2, "dp": 4}, {"schedule": "1f1b"}))
    axes, schedule, family = [("axis", "tp", "2"), ("axis", "dp", "4")], ("option", "schedule", "'1f1b'"), "'llama'"
    assert {*axes, schedule, ("family", (0,), family)} <= found
    assert {frozenset(pair) for pair in combinations([*axes, schedule], 2)} <= found
    assert {frozenset({("family", (0,), family), ("axis", name)}) for name in ("tp", "dp")} <= found
    assert ("meet", frozenset({"tp", "dp"})) in found
    assert len(found) == 4 + 3 + 2 + 1


def _kept(cells: list[Any], families: int) -> list[Any]:
    params = tiered(cells)
    assert [each.values for each in params] == cells
    kept = [each.values for each in params if not each.marks]
    assert all(each.marks == [pytest.mark.wide] for each in params if each.marks)
    assert len(kept) < len(cells) / 5
    assert len({family for family, *_ in kept}) == families
    return kept


def test_make_test_holds_every_family_on_every_axis_and_every_two_axes_that_meet() -> None:
    kept = _kept([(family, *layout) for family, layout in product(FAMILIES, WHOLE)], len(FAMILIES))
    axes = {axis for degrees, _ in WHOLE for axis in degrees}
    assert {(family, axis) for family, degrees, _ in kept for axis in degrees} == set(product(FAMILIES, axes))
    sets = {frozenset(degrees) for degrees, _ in WHOLE}
    assert {frozenset({"dp", "fsdp", "tp"}), frozenset({"cp", "pp", "fsdp"})} <= sets
    assert {frozenset(degrees) for _, degrees, _ in kept} == sets


def test_make_test_holds_every_schedule_on_every_number_of_ranks_beside_every_axis() -> None:
    wanted = list(layouts())
    kept = _kept([(family, *layout) for family, layout in product(DEEP, wanted)], len(DEEP))
    beside = {(options["schedule"], axis, degree) for degrees, options in wanted for axis, degree in degrees.items()}
    assert beside == {
        (options["schedule"], axis, degree) for _, degrees, options in kept for axis, degree in degrees.items()
    }


def test_families_that_are_only_there_to_have_one_do_not_count() -> None:
    cells = [("a", {"dp": 2}), ("b", {"dp": 2}), ("c", {"tp": 2})]
    assert [bool(each.marks) for each in tiered(cells)] == [False] * 3
    assert [bool(each.marks) for each in tiered(cells, layout_of)] == [False, True, False]
