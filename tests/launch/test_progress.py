"""The bar follows metrics.jsonl, and stumbles over nothing in it."""

import json
from pathlib import Path

import pytest

from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.local import Machine, plan_local
from meshwright.launch.progress import ProgressBar
from meshwright.launch.supervise import RunState


def test_the_bar_shows_the_newest_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = StartRequest("j", "r1", tmp_path, Program(("x",), tmp_path))
    bar = ProgressBar(tmp_path / "metrics.jsonl", 10)
    records = [{"step": 3, "loss": 2.5, "tokens_per_s": 1234.5}, {"event": "end"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records) + "no json\n[1]\n")
    bar(RunState(plan_local(request, Machine("box", 2))))
    task = bar._progress.tasks[0]
    assert (task.completed, task.total, task.description) == (3, 10, "loss 2.500  1,234 tokens/s")
    bar.write("a line with [brackets] stays as it is")
    bar.close()
    assert "a line with [brackets] stays as it is" in capsys.readouterr().out
