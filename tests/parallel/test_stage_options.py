"""Options about stages are checked when they are made; a file of a schedule is read then."""

from pathlib import Path
from typing import Any

import pytest

import meshwright as mw
from meshwright.parallel.errors import ScheduleError, WrapError
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Schedule


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"schedule": "1fb1"}, "schedule='1fb1' does not exist; did you mean '1f1b'"),
        ({"schedule": 5}, "schedule=5 does not exist; choose from: accumulate"),
        ({"blocks": "layers.*"}, r"is one text; write a list: blocks=\['layers.\*'\]"),
        ({"placement": {"cuts": [0, 1]}}, r"write Placement\(cuts, homes\)"),
        (
            {"stage_costs": "flop"},
            r"stage_costs='flop' does not exist; did you mean 'flops'\? \(or a list of numbers\)",
        ),
        ({"stage_costs": [1, float("nan")]}, r"stage_costs\[1\]=nan is no cost"),
        ({"stage_costs": [-1]}, r"stage_costs\[0\]=-1 is no cost"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
    ],
)
def test_values_that_do_not_exist_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(WrapError, match=why):
        Options.of(**given)


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_path_is_read_once_and_a_value_is_kept(as_path: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    options = Options.of(schedule=as_path(file), num_microbatches=2)
    file.unlink()
    assert options.schedule == Schedule.read("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", name=str(file))
    assert Options.of(schedule=options.schedule).schedule == options.schedule
    options.check(mw.Mesh(pp=2))
    with pytest.raises(ScheduleError, match=r"mine.csv is one of 2 ranks, but pp=4; nearest legal: pp=2"):
        options.check(mw.Mesh(pp=4))
    with pytest.raises(ScheduleError, match=r"mein.csv does not exist"):
        Options.of(schedule=as_path(tmp_path / "mein.csv"))


def test_one_micro_batch_after_the_other_on_stages_is_modular_in_groups_of_one() -> None:
    with pytest.raises(WrapError, match="nearest legal: schedule='modular' with group_size=1, one micro-batch after"):
        Options.of(num_microbatches=2).check(mw.Mesh(pp=2))
    Options.of(schedule="modular", group_size=1, num_microbatches=2).check(mw.Mesh(pp=2))
