"""What a node writes into a run directory of its own arrives in the launcher's."""

from pathlib import Path
from typing import Any

from meshwright.clusters.sending import Keeper, Sender, make_run_dir


def test_logs_and_results_arrive_as_they_are(tmp_path: Path) -> None:
    far, here = tmp_path / "far/run", tmp_path / "here"
    here.mkdir()
    make_run_dir(far, {"job.json": "{}"})
    assert (far / "job.json").read_text() == "{}"
    assert far.stat().st_mode & 0o777 == 0o700
    keeper = Keeper(here)
    sender = Sender(far, lambda _, **fields: keeper(fields))
    text = bytes(range(256)) * 3000
    (far / "logs/rank-3.log").write_bytes(text)
    (far / "errors/rank-3.json").write_text("{}")
    (far / "metrics.jsonl").write_text("a\nb\n")
    (far / "nodes").mkdir()
    (far / "nodes/gpu-01.b.jsonl").write_text("{}\n")
    (far / "nodes/.gpu-01.b.jsonl.part").write_text("{}\n")
    (far / "private/start.json").write_text("key")
    sender.finish()
    assert (here / "logs/rank-3.log").read_bytes() == text
    assert (here / "errors/rank-3.json").read_text() == "{}"
    assert (here / "metrics.jsonl").read_text() == "a\nb\n"
    assert [each.name for each in (here / "nodes").iterdir()] == ["gpu-01.b.jsonl"]
    assert not (here / "private").exists(), "what is private stays where it is"
    assert not (here / "job.json").exists()


def test_a_file_that_was_written_anew_is_sent_anew(tmp_path: Path) -> None:
    far, here = tmp_path / "far", tmp_path / "here"
    here.mkdir()
    make_run_dir(far, {})
    keeper = Keeper(here)
    (far / "metrics.jsonl").write_text("long line\n")
    sender = Sender(far, lambda _, **fields: keeper(fields))
    sender.finish()
    (far / "metrics.jsonl").write_text("ab\n")
    sender.finish()
    assert (here / "metrics.jsonl").read_text() == "ab\n"


def test_only_results_of_a_run_are_written_and_only_inside_its_directory(tmp_path: Path) -> None:
    here = tmp_path / "run"
    here.mkdir()
    keeper = Keeper(here)
    part: dict[str, Any] = {"at": 0, "data": "AAAA"}
    for path in (
        "../x.png",
        "logs/../../x.log",
        "/etc/x.png",
        "exit.json",
        "logs/a b.log",
        "plan.json",
        "logs/..log/x",
    ):
        keeper({"path": path, **part})
    keeper({"path": "logs/rank-0.log", "at": 1 << 40, "data": "AAAA"})
    assert list(tmp_path.rglob("*")) == [here]
