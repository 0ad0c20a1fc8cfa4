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


class Nodes:
    """Nodes with run directories of their own, and the launcher's; each start has senders and a keeper of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.here = folder, folder / "here"
        self.here.mkdir()

    def at(self, name: str) -> Path:
        make_run_dir(self._folder / name, {})
        return self._folder / name

    def start(self, **ranks: int) -> list[Sender]:
        keeper = Keeper(self.here)
        return [Sender(self.at(node), lambda _, **more: keeper(more), ranks=(rank,)) for node, rank in ranks.items()]

    def write(self, node: str, name: str, text: str, mode: str = "a") -> None:
        path = self.at(node) / name
        path.parent.mkdir(exist_ok=True)
        with path.open(mode) as file:
            file.write(text)

    def read(self, name: str) -> str:
        return (self.here / name).read_text()


def finish(senders: list[Sender]) -> None:
    for each in senders:
        each.finish()


def test_a_rank_that_moved_to_another_node_loses_nothing_and_what_its_old_node_has_is_not_sent_again(
    tmp_path: Path,
) -> None:
    nodes = Nodes(tmp_path)
    first = nodes.start(a=0, c=1)
    nodes.write("a", "metrics.jsonl", "step 1\nstep 2\nste")
    nodes.write("a", "ranks/0/error.json", '"of attempt 0"')
    nodes.write("a", "logs/rank-0.log", "begins\n")
    finish(first)
    again = nodes.start(b=0, a=1)
    nodes.write("b", "metrics.jsonl", "restart\nstep 3\n")
    nodes.write("b", "ranks/0/error.json", '"of attempt 1"')
    nodes.write("b", "logs/rank-0.log", "begins\nagain\n")
    nodes.write("a", "logs/rank-1.log", "one\n")
    finish(again)
    assert nodes.read("metrics.jsonl") == "step 1\nstep 2\nste\nrestart\nstep 3\n"
    assert nodes.read("ranks/0/error.json") == '"of attempt 1"'
    assert nodes.read("logs/rank-0.log") == "begins\nbegins\nagain\n"
    last = nodes.start(a=0, b=1)
    nodes.write("a", "logs/rank-0.log", "third\n")
    nodes.write("a", "errors/rank-1.json", "{}")
    finish(last)
    assert nodes.read("logs/rank-0.log") == "begins\nbegins\nagain\nthird\n"
    assert nodes.read("ranks/0/error.json") == '"of attempt 1"', "what is old there is not the newest"
    assert not (nodes.here / "errors/rank-1.json").exists(), "of a rank that is elsewhere"


def test_metrics_that_go_on_from_a_checkpoint_have_every_step_once(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    first = nodes.start(a=0)
    nodes.write("a", "metrics.jsonl", "step 1\nstep 2\nstep 3\n")
    finish(first)
    for node in ("b", "a"):
        again = nodes.start(**{node: 0})
        nodes.write(node, "metrics.jsonl", "step 1\nrestart\n", "w")
        nodes.write(node, "metrics.jsonl", "s 2\n")
        finish(again)
        assert nodes.read("metrics.jsonl") == "step 1\nrestart\ns 2\n"


def test_counters_that_were_thinned_take_the_place_of_those_before(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    first = nodes.start(a=0)
    nodes.write("a", "nodes/a.jsonl", "1\n2\n3\n4\n")
    finish(first)
    again = nodes.start(a=0)
    nodes.write("a", "nodes/a.jsonl", "12\n4\n", "w")
    finish(again)
    assert nodes.read("nodes/a.jsonl") == "12\n4\n"
