"""What was logged has a chart, what was not has none."""

import math
from pathlib import Path

import pytest

from meshwright.launch.page.panels import charts, figures
from meshwright.launch.page.read import RunView, read_view
from tests.launch.page.made import record, write_run


def view(*records: dict[str, object]) -> RunView:
    return RunView("j", "r", "running", records=records)


def test_a_run_on_gpus_with_experts_has_all_its_charts(tmp_path: Path) -> None:
    titles = [chart.title for chart in charts(read_view(write_run(tmp_path / "r")))]
    assert titles == [
        *("Loss", "Throughput", "Model-FLOP utilisation", "Gradient norm", "Learning rate", "Network"),
        *("GPU utilisation", "GPU power", "Memory", "Load of experts"),
    ]


def test_a_program_that_logs_only_a_loss_has_only_that() -> None:
    assert [chart.title for chart in charts(view({"step": 1, "loss": 2.0}))] == ["Loss"]
    assert charts(view()) == []
    assert charts(view({"event": "end"})) == []


def test_the_number_of_ranks_is_shown_where_it_changed() -> None:
    same, fewer = record(1, ranks=6), record(2, ranks=4)
    assert "Ranks" not in [chart.title for chart in charts(view(same, {**same, "step": 2}))]
    (sizes,) = [each for each in charts(view(same, fewer)) if each.title == "Ranks"]
    assert sizes.lines[0].points == ((1, 6.0), (2, 4.0))


def test_network_is_in_bytes_per_second_of_the_time_that_was_counted() -> None:
    (network,) = [each for each in charts(view(record(1), record(2, counted_s=0))) if each.title == "Network"]
    assert [(line.label, line.points) for line in network.lines] == [
        ("sent", ((1, 200_000_000.0),)),
        ("received", ((1, 100_000_000.0),)),
    ]


def test_loopback_is_shown_where_ranks_talk_over_it() -> None:
    alone = record(1, network_sent_bytes=0, network_received_bytes=0)
    assert "Loopback" in [chart.title for chart in charts(view(alone))]
    assert "Network" not in [chart.title for chart in charts(view(alone))]


def test_smoothing_follows_a_falling_curve_without_lag() -> None:
    line = [record(step, loss=100.0 - step) for step in range(1, 101)]
    (_, smoothed) = charts(view(*line))[0].lines
    assert [value for _, value in smoothed.points] == pytest.approx([100.0 - step for step in range(1, 101)])


def test_smoothing_leaves_out_what_is_no_number() -> None:
    line = [record(step, loss=math.nan if step == 50 else 1.0) for step in range(1, 101)]
    (raw, smoothed) = charts(view(*line))[0].lines
    assert (len(raw.points), len(smoothed.points)) == (100, 99)
    assert {value for _, value in smoothed.points} == {1.0}


def test_figures_tell_the_end_and_what_was_usual(tmp_path: Path) -> None:
    found = {name: (value, below) for name, value, below in figures(read_view(write_run(tmp_path / "r")))}
    assert found["Step"] == ("200", "of 250")
    assert found["Tokens"] == ("819k", "all ranks")
    assert found["Validation loss"] == ("2.50", "lowest 2.50")
    assert found["MFU"] == ("41.0%", "median 41.0%")
    assert found["Duration"] == ("3m 41s", "1 restart")


def test_a_loss_that_never_was_a_number_says_so() -> None:
    found = {name: (value, below) for name, value, below in figures(view({"step": 1, "loss": math.nan}))}
    assert found["Training loss"] == ("NaN", "no number")
