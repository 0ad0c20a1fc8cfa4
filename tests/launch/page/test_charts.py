"""Charts draw every value where it lies, mark what is no number, and stay small."""

import html
import json
import math
import re
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.page.charts import Chart, Line, draw, thin
from meshwright.launch.page.read import Mark
from meshwright.launch.page.units import SHARE

NAN = math.nan


def drawn(*points: tuple[float, float], marks: tuple[Mark, ...] = (), steps: float | None = None) -> Xml.Element:
    return Xml.fromstring(draw(Chart("Loss", (Line("training", points),)), marks, steps=steps))


def path(svg: Xml.Element) -> list[tuple[str, float, float]]:
    (found,) = [each.get("d", "") for each in svg.iter("path") if "line" in each.get("class", "").split()]
    return [(letter, float(x), float(y)) for letter, x, y in re.findall(r"([ML])([-0-9.]+) ([-0-9.]+)", found)]


def test_values_lie_between_their_axes_to_scale() -> None:
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = path(drawn((0, 0.0), (50, 5.0), (100, 10.0)))
    assert (x1 - x0, y0 - y1) == pytest.approx((x2 - x1, y1 - y2), abs=0.2)
    assert x0 < x1 < x2
    assert y0 > y1 > y2, "pixels count downwards"


def test_a_value_that_is_no_number_breaks_the_line_and_is_marked() -> None:
    svg = drawn((1, 2.0), (2, 2.0), (3, NAN), (4, 2.0), (5, math.inf), (6, 2.0))
    assert [letter for letter, *_ in path(svg)] == ["M", "L", "M", "M"]
    assert len([each for each in svg.iter("path") if each.get("class") == "lost"]) == 2


@pytest.mark.parametrize("points", [((7, 3.0),), ((7, NAN),), ((0, 0.0), (0, 0.0)), ((5, 1e300), (6, -1e300))])
def test_few_or_strange_points_are_drawn_too(points: tuple[tuple[float, float], ...]) -> None:
    for part in drawn(*points).iter():
        places = [value for name, value in part.items() if name not in ("data-hovers", "class")]
        assert not re.search("nan|inf", " ".join(places)), places


def test_restarts_stand_at_their_steps_and_say_their_cause() -> None:
    svg = drawn((0, 1.0), (100, 1.0), marks=(Mark(50, None, "rank 1 <died>"), Mark(500, None, "later")))
    (mark,) = [each for each in svg.iter("g") if each.get("class") == "restart"]
    title, line = mark.find("title"), mark.find("line")
    assert title is not None
    assert title.text == "restart 1 from step 50: rank 1 <died>"
    assert line is not None
    (_, first, _), (_, last, _) = path(svg)
    assert float(line.get("x1", "0")) == pytest.approx((first + last) / 2, abs=0.2)


def test_the_axis_goes_to_the_end_of_the_training() -> None:
    half = path(drawn((0, 1.0), (100, 1.0), steps=200))[-1][1]
    whole = path(drawn((0, 1.0), (100, 1.0)))[-1][1]
    assert half < 0.6 * whole


def test_a_pointer_is_told_every_line_at_its_step() -> None:
    chart = Chart("Use", (Line("full", ((1, 0.5), (2, 0.6))), Line("causal", ((2, 0.4),))), SHARE)
    hovers = json.loads(html.unescape(draw(chart).split('data-hovers="')[1].partition('"')[0]))
    assert [text for _, text in hovers] == ["step 1\nfull 50.0%", "step 2\nfull 60.0%\ncausal 40.0%"]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=1, max_size=3000), st.integers(4, 600))
def test_thinning_keeps_extremes_order_and_what_is_no_number(values: list[float], most: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, most)
    finite = [value for value in values if math.isfinite(value)]
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert len(kept) <= max(len(points) if len(points) <= most else 0, 1.5 * most + 3)
    left = [value for _, value in kept if math.isfinite(value)]
    assert (min(left, default=0), max(left, default=0)) == (min(finite, default=0), max(finite, default=0))
    assert (len(left) < len(kept)) == (len(finite) < len(values))


def test_a_long_run_gives_a_small_picture() -> None:
    many = tuple((float(step), math.sin(step)) for step in range(200_000))
    assert len(draw(Chart("Loss", (Line("training", many),)))) < 60_000
