"""A trace that Perfetto opens: processes of ranks, threads without overlaps, arrows from sends to receives."""

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first, one_forward_one_backward
from meshwright.parallel.pipeline.timeline import Costs, Timeline, timeline
from meshwright.parallel.pipeline.trace import trace


def slices(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(process, thread) -> its slices in order; fails where two of them overlap, nested or not."""
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    for thread in found.values():
        thread.sort(key=lambda event: (event["ts"], event["dur"]))
        for one, other in pairwise(thread):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-6, (one, other)
    return found


def check_arrows(events: list[dict[str, Any]], num_arrows: int) -> None:
    """Each arrow leads from inside of a send to inside of its receive, on another rank, and not back in time."""
    threads = slices(events)
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == num_arrows
    for number, start in starts.items():
        names = []
        for end in (start, ends[number]):
            around = [
                each["name"]
                for each in threads[end["pid"], end["tid"]]
                if each["ts"] <= end["ts"] <= each["ts"] + each["dur"]
            ]
            names.append(" ".join(around))
        assert "SEND_" in names[0]
        assert "RECV_" in names[1]
        assert start["pid"] != ends[number]["pid"]


def test_a_trace_holds_every_action_with_its_time() -> None:
    found = timeline(breadth_first([0, 1], 2), Costs(unit_s=0.5))
    events = json.loads(trace(found))["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert len(spans) == 8
    assert (spans["1F0"]["pid"], spans["1F0"]["ts"], spans["1F0"]["dur"]) == (1, 0.5e6, 0.5e6)
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(
    "found",
    [
        timeline(lowered(breadth_first([0, 1, 0, 1], 3), zero_stage=3), Costs(latency=0.3, gather=1.7, reduce=2.9)),
        timeline(lowered(one_forward_one_backward([0, 1, 2, 0, 1, 2], 4), zero_stage=3)),
    ],
)
def test_threads_do_not_overlap_and_sends_lead_to_receives(found: Timeline) -> None:
    check_arrows(
        json.loads(trace(found))["traceEvents"], sum("SEND" in span.action.kind for span in found.communication)
    )
