"""The merged stream: every rank's lines with host and rank, on the terminal those of the chosen ranks."""

from dataclasses import replace
from pathlib import Path

from meshwright.clusters.base import Program, StartPlan, StartRequest
from meshwright.clusters.failure import Failure
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.masking import Mask
from meshwright.clusters.retry import Decision
from meshwright.launch.rundir import create_run_dir
from meshwright.launch.stream import MergedStream, Shown
from meshwright.launch.supervise import RunState


def started(folder: Path) -> tuple[StartPlan, Shown, list[str]]:
    create_run_dir(folder / "r1")
    request = StartRequest("j", "r1", folder / "r1", Program(("x",), folder), num_nodes=2)
    lines: list[str] = []
    shown = Shown({1}, "{host}:{rank}", keep_attempts=1, mask=Mask(["hunter22"]), write=lines.append)
    return plan_local(request, Machine("box", 2)), shown, lines


def test_lines_carry_host_and_rank_and_no_secret(tmp_path: Path) -> None:
    plan, shown, lines = started(tmp_path)
    stream = MergedStream(tmp_path / "r1", shown)
    for rank in (0, 1):
        (tmp_path / f"r1/logs/rank-{rank}.log").write_text(f"\x1b[1mhunter22\x1b[0m {rank}\nunfinished")
    stream(RunState(plan))
    assert lines == ["node1:1 | *** 1"]
    stream.close()
    assert lines[1:] == ["node1:1 | unfinished"]
    assert sorted((tmp_path / "r1/merged.log").read_text().splitlines()) == [
        "node0:0 | *** 0",
        "node0:0 | unfinished",
        "node1:1 | *** 1",
        "node1:1 | unfinished",
    ]


def test_a_new_attempt_has_new_files_and_the_oldest_go(tmp_path: Path) -> None:
    plan, shown, lines = started(tmp_path)
    stream, logs = MergedStream(tmp_path / "r1", replace(shown, prefix="{rank}>")), tmp_path / "r1/logs"
    (logs / "rank-1.log").write_text("first\n")
    stream(RunState(plan))
    (logs / "rank-1.attempt-1.log").write_text("second\n")
    stream(RunState(plan, attempt=1))
    stream.close()
    assert lines == ["1> | first", "1> | second"]
    assert [path.name for path in logs.iterdir()] == ["rank-1.attempt-1.log"]


def test_lines_of_a_new_start_carry_the_names_of_its_nodes(tmp_path: Path) -> None:
    plan, shown, lines = started(tmp_path)
    stream, state = MergedStream(tmp_path / "r1", shown), RunState(plan)
    stream(state)
    other = replace(plan, nodes=(plan.nodes[0], replace(plan.nodes[1], name="spare")))
    state.go_on(other, Decision(True, "", 0.0, 0, Failure("node1"), excludes=()))
    (tmp_path / "r1/logs/rank-1.attempt-1.log").write_text("second\n")
    stream(state)
    stream.close()
    assert lines == ["spare:1 | second"]
