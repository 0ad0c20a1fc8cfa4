"""Heat maps: text to the letter; pictures that are written, have the colours of their loads, and say what is worst."""

import sys
from pathlib import Path
from typing import Any

import pytest

from meshwright.moe.errors import MetricsError
from meshwright.moe.heat_map import draw_heat_map, heat_text
from meshwright.moe.load import Load
from meshwright.parallel.errors import PlotError

EVEN = Load((9, 9, 9, 9), num_nodes=2)
HOT = Load((36, 0, 0, 0), num_nodes=2)


Shown = tuple[list[str], list[list[str]]]


def shown(monkeypatch: pytest.MonkeyPatch, loads: dict[str, Load], path: Path) -> Shown:
    """All words of a picture, and the colours of its cells."""
    figure = pytest.importorskip("matplotlib.figure")
    text, colours = pytest.importorskip("matplotlib.text"), pytest.importorskip("matplotlib.colors")
    found: list[Shown] = []
    save = figure.Figure.savefig

    def saved(self: Any, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        (image,) = self.axes[0].images
        cells = [[colours.to_hex(cell) for cell in row] for row in image.to_rgba(image.get_array())]
        found.append(([each.get_text() for each in self.findobj(text.Text)], cells))

    monkeypatch.setattr(figure.Figure, "savefig", saved)
    draw_heat_map(loads, path)
    return found[0]


def test_text_has_a_block_for_each_expert_and_spaces_between_nodes() -> None:
    steps = Load((1, 2, 4, 8, 16, 32, 64, 1), num_nodes=4)  # mean 16
    assert heat_text({"a": EVEN, "layer": HOT, "no": Load((0,) * 4, num_nodes=2)}) == (
        "a      ▄▄ ▄▄  worst expert 0: 1.00x, worst node 1.00x\n"
        "layer  █· ··  worst expert 0: 4.00x, worst node 2.00x, 3 dead\n"
        "no     ·· ··  no rows"
    )
    assert heat_text({"x": steps}) == "x  ▁▁ ▁▂ ▄▆ █▁  worst expert 6: 4.00x, worst node 2.03x"


def test_one_expert() -> None:
    assert heat_text({"x": Load((3,))}) == "x  ▄  worst expert 0: 1.00x"


def test_even_loads_are_pale_hot_ones_red_cold_ones_blue_and_dead_ones_black(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = {
        "even": Load((5,) * 8),
        "half": Load((2, 4, 4, 4, 4, 4, 8, 2)),
        "far": Load((910, 10, 0, 10, 10, 10, 10, 10)),
    }
    _, (even, half, far) = shown(monkeypatch, loads, tmp_path / "map.png")
    assert even == ["#f6f6f4"] * 8
    assert half == ["#6f9ad1", *["#f6f6f4"] * 5, "#e58a63", "#6f9ad1"]
    assert far == ["#9c2f17", "#1f4e8c", "#22262b", *["#1f4e8c"] * 5]


def test_the_file_is_a_picture_with_these_colours(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    draw_heat_map({"even": EVEN}, tmp_path / "even.png")
    pixels = (image.imread(tmp_path / "even.png")[..., :3] * 255).round().astype("uint8").reshape(-1, 3)
    pale = (pixels == list(bytes.fromhex("f6f6f4"))).all(1).mean()
    assert 0.2 < pale < 0.8


def test_the_title_says_what_is_worst_and_numbers_are_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, _ = shown(monkeypatch, {"a": EVEN, "b": Load((1, 2, 4, 1), num_nodes=2)}, tmp_path / "map.png")
    assert "load of experts: worst 2.00x the mean (b, expert 2), worst node 1.25x (b)" in words
    assert words.count("1.00") == 5
    assert {"0.50", "2.00", "a", "b", "2: 2.00x", "0: 1.00x", "0: up to 1.00x", "1: up to 1.25x"} <= set(words)


def test_the_worst_node_may_be_of_another_layer_than_the_worst_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = {"expert": Load((9, 0, 3, 6), num_nodes=2), "node": Load((3, 3, 1, 1), num_nodes=2)}
    words, _ = shown(monkeypatch, loads, tmp_path / "map.png")
    assert "load of experts: worst 2.00x the mean (expert, expert 0), worst node 1.50x (node)" in words


def test_without_nodes_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, _ = shown(monkeypatch, {"a": Load((3, 1, 0, 0))}, tmp_path / "map.png")
    assert "load of experts: worst 3.00x the mean (a, expert 0)" in words
    assert {"3.00", "0", "0: 3.00x, 2 dead"} <= set(words)
    assert not [word for word in words if "node" in word]


def test_numbers_that_do_not_fit_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, _ = shown(monkeypatch, {"a": Load((7,) * 128, num_nodes=64)}, tmp_path / "map.png")
    assert "1.00" not in words
    assert "0: 1.00x" in words  # beside the row


def test_layers_without_rows_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, _ = shown(monkeypatch, {"a": Load((0,) * 4)}, tmp_path / "map.png")
    assert {"load of experts: no rows", "no rows"} <= set(words)


@pytest.mark.parametrize("loads", [{}, {"a": EVEN, "b": Load((1, 2))}, {"a": EVEN, "b": Load((9, 9, 9, 9))}])
def test_layers_of_other_sizes_are_refused(loads: dict[str, Load], tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"make no map; give one layer or more, of one size"):
        heat_text(loads)
    with pytest.raises(MetricsError, match=r"none|a: 4 on 2, b: "):
        draw_heat_map(loads, tmp_path / "map.png")


def test_where_matplotlib_is_missing_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'meshwright\[plots\]'"):
        draw_heat_map({"a": EVEN}, tmp_path / "map.png")
