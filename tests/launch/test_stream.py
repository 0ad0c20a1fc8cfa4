"""The merged stream: every rank's lines with host and rank, on the terminal those of the chosen ranks."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Program, StartPlan, StartRequest
from meshwright.clusters.failure import Failure
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.masking import Mask
from meshwright.clusters.retry import Decision
from meshwright.launch.logs import LogTail
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


OF_MANY = """
import os, resource, sys
from dataclasses import replace
from pathlib import Path
from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.masking import Mask
from meshwright.launch.stream import MergedStream, Shown
from meshwright.launch.supervise import RunState

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
run_dir, ranks = Path(sys.argv[1]), 500
request = StartRequest("j", "r1", run_dir, Program(("x",), run_dir), num_nodes=2, ranks_per_node=ranks // 2)
state = RunState(plan_local(request, Machine("box", 2)))
stream = MergedStream(run_dir, Shown({}, "{rank}", keep_attempts=1, mask=Mask([]), write=print))
for part in ("first\\nsec", "ond\\nlast"):
    for rank in range(ranks):
        with (run_dir / f"logs/rank-{rank}.log").open("a") as file:
            file.write(part)
    stream(state)
print(len(os.listdir("/proc/self/fd")))
stream.close()
"""


@pytest.mark.parametrize(("soft", "hard", "kept"), [(256, 4096, 500), (256, 256, 100)])
def test_no_line_is_lost_where_ranks_are_more_than_files_that_may_be_open(
    tmp_path: Path, soft: int, hard: int, kept: int
) -> None:
    create_run_dir(tmp_path / "r1")
    words = [sys.executable, "-c", OF_MANY, str(tmp_path / "r1"), str(soft), str(hard)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) >= kept, "as many as may be stay open"
    lines = (tmp_path / "r1/merged.log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{rank} | {word}" for rank in range(500) for word in ("first", "second", "last"))


def test_a_process_that_can_open_nothing_more_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text("line\n")
    lines: list[bytes] = []
    tail = LogTail(tmp_path / "log", lines.append)
    with monkeypatch.context() as full:
        full.setattr(os, "open", _none_left)
        with pytest.raises(OSError, match="Too many open files"):
            tail.read()
    tail.close()
    assert lines == [b"line"], "and goes on where it was"


def _none_left(*_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
