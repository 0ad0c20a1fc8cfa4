"""A timeline is a picture of text that fits its terminal and stays readable."""

from meshwright.parallel.pipeline.draw import drawn
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first
from meshwright.parallel.pipeline.timeline import Costs, timeline
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_h1


def test_a_row_shows_each_slice_of_time_of_a_rank() -> None:
    rows = drawn(timeline(breadth_first([0, 1], 2)), width=9).splitlines()
    assert rows[0] == "rank 0  01...AABB"
    assert rows[1] == "rank 1  .01AABB.."
    assert rows[2].startswith("bubble 50.0%")


def test_kinds_have_their_own_letters_and_colours() -> None:
    split = timeline(zero_bubble_h1([0, 1], 1))
    assert drawn(split, width=5).splitlines()[0] == "rank 0  0..Aw"
    again = timeline(lowered(breadth_first([0], 1), recompute=True))
    assert drawn(again, width=4).splitlines()[0] == "rank 0  0rAA"
    assert "\x1b[34m0\x1b[0m" in drawn(split, width=5, colour=True)


def test_waiting_for_communication_is_told_from_idle_time() -> None:
    found = timeline(lowered(breadth_first([0, 1], 1), zero_stage=3), Costs(latency=1, gather=1, reduce=1))
    assert drawn(found, width=10).splitlines() == [
        "rank 0  ~0....~AA~",
        "rank 1  ..~0AA...~",
        "bubble 233.3%; digits: forward of a micro-batch, capitals: its backward (A is 0), w: weights, r: recompute, "
        "dots: idle, ~: waits for communication",
    ]


def test_more_than_fits_is_drawn_by_kind_and_in_few_rows() -> None:
    found = timeline(breadth_first(range(64), 64))
    rows = drawn(found, width=60).splitlines()
    assert [len(row) for row in rows[:2]] == [69, 69]
    assert (len(rows), rows[32]) == (42, "(24 more ranks)")
    assert rows[0] == "rank 0   " + "-" * 10 + "." * 30 + "#" * 20
    assert rows[-1].startswith("bubble 98.4%; -: forward, #: backward")
