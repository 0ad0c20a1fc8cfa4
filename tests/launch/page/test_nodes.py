"""What each node did stands in the page: a line per node, or the spread of many, at the steps that ranks had then."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.launch.page.charts import Chart
from meshwright.launch.page.nodes import node_charts
from meshwright.launch.page.panels import charts
from meshwright.launch.page.read import read_view
from tests.launch.page.made import START_S, write_run

STEPS = [{"step": step, "time_unix_s": 100.0 + 2 * step} for step in (10, 20)]  # 120 s and 140 s


def told(time_s: float, **more: Any) -> dict[str, Any]:
    return {"time_unix_s": time_s, "counted_s": 5.0, "network_sent_bytes": 50, "cpu_utilisation": 0.5, **more}


def drawn(**nodes: list[dict[str, Any]]) -> dict[str, Chart]:
    return {chart.title: chart for chart in node_charts(nodes, STEPS)}


def test_a_few_nodes_have_a_line_each_in_bytes_per_second_at_their_steps() -> None:
    found = drawn(n0=[told(125.0), told(135.0, rdma_sent_bytes=25)], n1=[told(130.0, network_sent_bytes=0)])
    assert [(line.label, line.points) for line in found["Network"].lines] == [
        ("n0", ((12.5, 10.0), (17.5, 15.0))),
        ("n1", ((15.0, 0.0),)),
    ]


def test_what_was_counted_while_no_step_was_logged_is_not_on_the_axis() -> None:
    found = drawn(n0=[told(119.0), told(120.0), told(140.0), told(141.0)])
    assert [step for step, _ in found["Processors"].lines[0].points] == [10, 20]
    assert drawn(n0=[told(1.0)]) == {}
    assert list(node_charts({"n0": [told(125.0)]}, [])) == []


def test_the_network_of_a_single_node_is_what_rank_0_tells() -> None:
    assert set(drawn(n0=[told(125.0)])) == {"Processors"}
    assert set(drawn(n0=[told(125.0)], n1=[told(125.0)])) == {"Network", "Processors"}


def test_many_nodes_are_drawn_as_their_spread_and_the_ends_are_named() -> None:
    nodes = {f"n{each}": [told(125.0, cpu_utilisation=each / 10)] for each in range(9)}
    chart = drawn(**nodes)["Processors"]
    assert [(line.label, line.points[0][1]) for line in chart.lines] == [
        ("highest", 0.8),
        ("median", 0.4),
        ("lowest", 0.0),
    ]
    assert "9 nodes, on average most on n8, least on n0" in chart.note


@pytest.mark.parametrize("strange", [None, "x", float("nan"), float("inf"), -1, 0, True, [], 10**400])
def test_strange_counters_tell_less(strange: object) -> None:
    for key in ("time_unix_s", "counted_s", "network_sent_bytes"):
        assert drawn(n0=[told(125.0)], n1=[{**told(125.0), key: strange}])


def test_charts_of_nodes_take_the_place_of_rank_0s(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "r")
    (run_dir / "nodes").mkdir()
    for node in ("n0", "n1"):
        rows = [told(START_S + each, gpu_utilisation=0.5, gpu_memory_used_bytes=9) for each in range(10, 90, 5)]
        (run_dir / f"nodes/{node}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"torn')
    found = charts(read_view(run_dir))
    titles = [chart.title for chart in found]
    assert titles[5:] == [
        *("Network", "Processors", "GPU utilisation", "GPU memory", "GPU power", "Memory", "Load of experts"),
    ]
    for title in ("Network", "GPU utilisation"):
        (chart,) = [each for each in found if each.title == title]
        assert [line.label for line in chart.lines] == ["n0", "n1"]
