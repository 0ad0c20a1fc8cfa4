"""A timeline is a picture of text and a trace that Perfetto opens."""

import json

from meshwright.parallel.pipeline.draw import drawn, trace
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first
from meshwright.parallel.pipeline.timeline import timeline
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


def test_a_trace_holds_every_action_with_its_time() -> None:
    found = timeline(breadth_first([0, 1], 2))
    events = json.loads(trace(found, unit_s=0.5))["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert len(spans) == 8
    assert (spans["1F0"]["tid"], spans["1F0"]["ts"], spans["1F0"]["dur"]) == (1, 0.5e6, 0.5e6)
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["rank 0", "rank 1"]
