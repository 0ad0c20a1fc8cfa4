"""The table of a sweep is read from what its runs left on disk."""

import json
from pathlib import Path

import pytest

from meshwright.launch.runs import Known, remember
from meshwright.launch.summary import SWEEP_FILE, conclude, rows_of

pytestmark = pytest.mark.usefixtures("own_state")


def test_rows_say_state_last_loss_and_duration_and_the_record_their_worst(tmp_path: Path) -> None:
    dirs = [tmp_path / f"s-{index}" for index in range(3)]
    for path in dirs:
        path.mkdir()
    runs = [{"run_id": path.name, "run_dir": str(path), "set": ["a=1", "b=2"]} for path in dirs]
    (tmp_path / SWEEP_FILE).write_text(json.dumps({"runs": runs}))
    for path, code in zip(dirs[:2], (0, 7), strict=True):
        remember(Known(path.name, "j", "local", str(path), 1.0, sweep="s"))
        state = "failed" if code else "succeeded"
        told = {"state": state, "exit_code": code, "reason": "", "started_unix_s": 2.0, "ended_unix_s": 5.5}
        (path / "exit.json").write_text(json.dumps(told))
    (dirs[0] / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"validation": 1}\n{"st'
    )
    sweep = Known("s", "j", "local", str(tmp_path), 1.0, runs=tuple(map(str, dirs)))
    first, second, third = rows_of(sweep)
    assert (first.values, first.state, first.loss, first.duration_s) == ("a=1 b=2", "succeeded", 2.5, 3.5)
    assert (second.state, second.exit_code, second.loss) == ("failed", 7, None)
    assert (third.state, third.exit_code) == ("not started", None)
    lines: list[str] = []
    assert conclude(sweep, lines.append, as_json=False) == 7
    assert lines[2].split() == ["s-1", "a=1", "b=2", "failed", "(7)", "-", "3.5s"]
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["state"], record["reason"]) == ("failed", "2 of 3 runs did not succeed")
    assert conclude(sweep, lines.append, as_json=False, code=130) == 130
