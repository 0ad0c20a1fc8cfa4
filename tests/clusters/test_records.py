"""What ranks left behind is read as far as it is whole and of this attempt."""

import json
import os
from pathlib import Path

from meshwright.clusters.records import error_records, hang_record, last_words, newest_step
from meshwright.launch.rundir import create_run_dir


def test_error_records_of_an_earlier_attempt_or_half_written_are_left_out(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    told = {"rank": 0, "time_unix_s": 5.0, "type": "E", "message": "m", "traceback": "TB\n", "exit_code": 65}
    (tmp_path / "r1/errors/rank-0.json").write_text(json.dumps(told))
    (tmp_path / "r1/errors/rank-1.json").write_text('{"rank": 1')
    assert error_records(tmp_path / "r1", since_unix_s=6.0) == {}
    found = error_records(tmp_path / "r1", since_unix_s=4.0)
    assert (found[0].traceback, found[0].exit_code, list(found)) == ("TB", 65, [0])


def test_what_ranks_were_last_at_is_read_of_this_attempt_as_one_safe_line(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    told = {"words": "all_reduce over dp (number 41)", "step": 7, "life": "1"}
    texts = {0: told, 1: {**told, "words": "a\nb\x1b[31m", "step": None}, 2: {**told, "life": "0"}, 3: {}}
    for rank, text in texts.items():
        (tmp_path / f"r1/ranks/{rank}").mkdir()
        (tmp_path / f"r1/ranks/{rank}/progress.json").write_text(json.dumps(text))
    assert last_words(tmp_path / "r1", 1) == {0: "all_reduce over dp (number 41) in step 7", 1: "a b"}
    record = {"rank": 0, "time_unix_s": 5.0, "traceback": "TB", "at": "backward in step 8"}
    (tmp_path / "r1/errors/rank-0.json").write_text(json.dumps(record))
    assert error_records(tmp_path / "r1")[0].last == "backward in step 8"


def test_a_hang_is_read_unless_it_is_broken_or_of_an_earlier_attempt(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    told = {"found_by": 0, "line": "hang: it", "suspects": [1], "ranks": {"0": "waits"}, "stacks": {}}
    for attempt, time_s in enumerate((10.0, 20.0)):
        (tmp_path / f"r1/errors/hang-{attempt}.json").write_text(json.dumps({**told, "time_unix_s": time_s}))
    (tmp_path / "r1/errors/hang-2.json").write_text("{")
    found = hang_record(tmp_path / "r1", 15.0)
    assert found is not None
    assert (found.time_unix_s, found.suspects, found.ranks) == (20.0, (1,), {0: "waits"})
    assert hang_record(tmp_path / "r1", 25.0) is None


def test_how_far_ranks_came_is_seen_in_metrics_notes_and_checkpoints_of_this_run(tmp_path: Path) -> None:
    run, saved = tmp_path / "r1", tmp_path / "c"
    create_run_dir(run)
    assert newest_step(run, 0.0) is None
    (run / "metrics.jsonl").write_text('{"step": 4}\n{"event": "resumed"}\n{"step": 6}\n{"ste')
    assert newest_step(run, 0.0) == 6
    (run / "ranks/0").mkdir()
    (run / "ranks/0/progress.json").write_text('{"step": 7}')
    assert newest_step(run, 0.0) == 7
    (run / "job.json").write_text(json.dumps({"checkpoint": {"dir": str(saved)}}))
    assert newest_step(run, 0.0) == 7
    for name in ("step-00000010", "checkpoint-30", ".step-40", "step-50.partial", "model_20.pt", "v1.60", "old-70"):
        (saved / name).mkdir(parents=True)
    os.utime(saved / "old-70", (100.0, 100.0))
    assert newest_step(run, 1000.0) == 30


def test_what_cannot_be_read_tells_nothing_of_steps(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "r1")
    (tmp_path / "r1/metrics.jsonl").write_bytes(b"\xff\xfe[]\n3\nnull\n{}\n")
    (tmp_path / "r1/job.json").write_text('{"checkpoint": null}')
    assert newest_step(tmp_path / "r1", 0.0) is None
