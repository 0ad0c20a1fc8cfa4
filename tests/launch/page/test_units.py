"""Axes have round places that cover their range; numbers carry their unit."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.page.units import BYTES, COUNT, PLAIN, SHARE, STEP, duration, ticks

FINITE = st.floats(-1e12, 1e12, allow_nan=False).map(lambda value: float(f"{value:.6g}"))


@given(FINITE, FINITE)
def test_places_cover_the_range_and_are_few_and_even(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    found = ticks(low, high)
    spare = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert found[0] <= low + spare
    assert found[-1] >= high - spare
    assert 2 <= len(found) <= 7
    gaps = [after - before for before, after in pairwise(found)]
    assert min(gaps) > 0
    assert max(gaps) - min(gaps) <= 1e-6 * max(map(abs, found))


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_any_two_floats_have_places_that_ascend(one: float, other: float) -> None:
    found = ticks(min(one, other), max(one, other))
    assert all(before < after for before, after in pairwise(found)), found
    assert len(found) >= 2


@given(st.floats(1e-9, 1e15))
def test_labels_of_an_axis_tell_its_places_apart(high: float) -> None:
    places = ticks(0.0, high)
    for unit in (PLAIN, COUNT, SHARE, BYTES):
        assert len(set(unit.labels(places))) == len(places), unit


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (STEP.text(1234567), "1,234,567"),
        (STEP.labels([0, 1_000_000, 2_000_000]), ["0", "1M", "2M"]),
        (COUNT.text(999_960), "1.00M"),
        (BYTES.text(38_400_000_000), "38.4 GB"),
        (PLAIN.text(0), "0"),
        (PLAIN.text(-float("inf")), "-∞"),
        (SHARE.text(1.0), "100%"),
        (duration(3_600), "1h"),
        (duration(90_000), "1d 1h"),
    ],
)
def test_numbers_read_well(shown: object, wanted: object) -> None:
    assert shown == wanted
