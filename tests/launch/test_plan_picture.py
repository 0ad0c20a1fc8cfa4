"""The picture of a plan shows time and memory by cause, of what fits or of what comes nearest."""

from pathlib import Path

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Transformer
from meshwright.clusters.simulated.candidates import RUNNABLE, Question
from meshwright.clusters.simulated.search import search
from meshwright.launch.plan_picture import draw_plan
from meshwright.launch.plan_report import Plan, plan_of
from meshwright.parallel.errors import PlotError

SMALL = Transformer(layers=16, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, sequence=4096, gated=True)


def _plan(num_gpus: int) -> Plan:
    asked = Question(model=SMALL, cluster=Cluster(gpu=gpu("A100"), num_gpus=num_gpus), global_batch=32, space=RUNNABLE)
    return plan_of(search(asked, 4), name="small", notes=(), search_s=0.0, tokens=None, per_node=None)


def _colours(path: Path) -> set[bytes]:
    pixels = (pytest.importorskip("matplotlib.image").imread(path)[:, :, :3] * 255).round().astype("uint8")
    return {bytes(each) for each in {row.tobytes() for row in pixels} for each in zip(*[iter(each)] * 3, strict=True)}


def test_times_memory_and_its_limit_are_there(tmp_path: Path) -> None:
    draw_plan(_plan(16), tmp_path / "plan.png")
    seen = _colours(tmp_path / "plan.png")
    for colour in ("3b6fb6", "2f8f6b", "d9a441", "b3261e"):
        assert bytes.fromhex(colour) in seen, colour


def test_the_nearest_is_drawn_where_nothing_fits(tmp_path: Path) -> None:
    plan = _plan(1)
    assert plan.found.nearest is not None
    draw_plan(plan, tmp_path / "plan.png")
    assert bytes.fromhex("d9a441") in _colours(tmp_path / "plan.png")


def test_what_cannot_be_drawn_or_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="no layout is legal for 37 GPUs"):
        draw_plan(_plan(37), tmp_path / "plan.png")
    with pytest.raises(PlotError, match="cannot be written"):
        draw_plan(_plan(16), tmp_path / "none" / "plan.png")
