"""A picture is written, is not blank, and shows what takes part."""

import sys
from pathlib import Path

import pytest

from meshwright.parallel.errors import PlotError
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first
from meshwright.parallel.pipeline.picture import draw_picture
from meshwright.parallel.pipeline.timeline import Costs, timeline


def test_a_picture_shows_work_links_and_waits_of_each_timeline(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.image")
    free = timeline(lowered(breadth_first([0, 1], 2), zero_stage=3))
    dear = timeline(lowered(breadth_first([0, 1], 2), zero_stage=3), Costs(latency=1, gather=1, reduce=1))
    draw_picture({"one": free, "two": dear}, tmp_path / "both.png")
    pixels = (pyplot.imread(tmp_path / "both.png")[:-70, :, :3] * 255).round().astype("uint8")  # without the legend
    seen = {bytes(each) for each in {row.tobytes() for row in pixels} for each in zip(*[iter(each)] * 3, strict=True)}
    for colour in ("3b6fb6", "2f8f6b", "c2571a", "8f2d56", "5f6b7a", "f0a58f", "f0f1f3"):
        assert bytes.fromhex(colour) in seen, colour


def test_where_matplotlib_is_missing_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'meshwright\[plots\]'"):
        draw_picture({"one": timeline(breadth_first([0, 1], 2))}, tmp_path / "one.png")
