"""A run that lost nodes goes on with others, as its policy allows; where it cannot, it says why and what to do."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.base import Limits, Program, StartPlan, StartRequest
from meshwright.clusters.blame import Verdict
from meshwright.clusters.contract import Handle
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.retry import RetryPolicy
from meshwright.clusters.sweep import carriers
from meshwright.launch.follow import Run, follow
from meshwright.launch.load import load_job
from meshwright.launch.page.document import Live
from meshwright.launch.page.write import write_page
from meshwright.launch.relaunch import decision_on_end
from meshwright.launch.report import outcome_of
from meshwright.launch.supervise import RunState
from tests.launch.own import own
from tests.launch.test_launch import RUN, run
from tests.launch.test_launch import write_job as launch_job
from tests.launch.test_restarts import AGAIN
from tests.launch.test_supervise import end, gone, result
from tests.launch.waiting import eventually
from tests.launch.worker.runs import finish, losses, run_dir, start, write_job


def plan(restarts: int = 2, **retry: Any) -> StartPlan:
    limits = Limits(restarts, retry=RetryPolicy(jitter=0.0, **retry))
    request = StartRequest("j", "r1", Path("/r1"), Program(("true",), Path("/")), num_nodes=2, limits=limits)
    return plan_local(request, Machine("box", 2))


def after(*events: dict[str, Any], found: StartPlan | None = None) -> RunState:
    state = RunState(found or plan())
    for event in events:
        state.observe(event)
    return state


def test_a_node_without_a_word_is_left_out_with_its_reason_and_the_step_that_was_reached(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    decision = decision_on_end(after(gone("node1", -9)), tmp_path, 0.0)
    assert decision is not None
    assert (decision.again, decision.excludes, decision.wait_s, decision.step) == (True, ("node1",), 1.0, 8)
    assert decision.failure.evidence == "the agent of node1 died (SIGKILL); its ranks were ended"


def test_a_run_that_may_not_restart_or_lost_nothing_ends_as_it_did(tmp_path: Path) -> None:
    assert decision_on_end(after(gone("node1"), found=plan(0)), tmp_path, 0.0) is None
    assert decision_on_end(after(end("node0", 0, 7), result("node0", "failed"), found=plan(0)), tmp_path, 0.0) is None
    assert decision_on_end(after(end("node0", 0, 0), result("node0", "succeeded")), tmp_path, 0.0) is None
    assert decision_on_end(after({**AGAIN, "only_lost": False, "excludes": []}), tmp_path, 0.0) is None


def test_where_no_agent_outlives_a_failed_rank_the_launcher_decides_from_what_it_left(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-1.log").write_text("Traceback (most recent call last):\nModuleNotFoundError: No module\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    ends = end("node0", 0, -15, asked=True), end("node1", 1, 7), result("node0", "failed"), result("node1", "failed")
    given_up = decision_on_end(after(*ends), tmp_path, 0.0)
    assert given_up is not None
    assert (given_up.again, given_up.failure.kind, given_up.step) == (False, "import_error", 8)
    (tmp_path / "logs/rank-1.log").write_text("")
    decision = decision_on_end(after(*ends), tmp_path, 0.0)
    assert decision is not None
    found = decision.failure
    assert (decision.again, found.kind, found.exit_code, found.node, found.rank) == (True, "exit", 7, "node1", 1)
    assert (decision.excludes, decision.wait_s) == ((), 1.0)
    saved = decision_on_end(after(end("node0", 0, 75), result("node0", "failed")), tmp_path, 0.0)
    assert saved is not None
    assert (saved.again, saved.failure.kind) == (True, "preempt")


def test_a_hang_that_is_to_stop_the_run_does_whoever_decides(tmp_path: Path) -> None:
    limits = Limits(2, hang_s=5.0, hang_action="dump_and_stop")
    state = after(end("node0", 0, 125), result("node0", "failed"), found=replace(plan(), limits=limits))
    decision = decision_on_end(state, tmp_path, 0.0)
    assert decision is not None
    assert (decision.again, decision.reason) == (False, "failure.hang.action is dump_and_stop")


@pytest.mark.parametrize("word", ["setup_failed", "rendezvous_failed", "error"])
def test_what_failed_before_ranks_ran_or_beside_them_is_no_failure_of_a_rank(tmp_path: Path, word: str) -> None:
    assert decision_on_end(after(result("node1", word), end("node0", 0, 7)), tmp_path, 0.0) is None
    beside = gone("node0") | {"exit_code": 69, "message": "mpiexec ended", "lost": False}  # MPI ends all with one
    assert decision_on_end(after(result("node1", word), beside), tmp_path, 0.0) is None


def test_a_node_of_which_nobody_knows_whether_it_was_its_fault_is_not_left_out(tmp_path: Path) -> None:
    lost = [gone(name) | {"exit_code": 69, "message": "mpiexec died", "lost": False} for name in ("node0", "node1")]
    decision = decision_on_end(after(*lost, found=plan(exclude_after=1)), tmp_path, 0.0)
    assert decision is not None
    assert (decision.again, decision.excludes) == (True, ())


def test_nodes_of_which_any_may_be_all_right_are_used_again(tmp_path: Path) -> None:
    lost = [gone(name) | {"exit_code": 69, "message": "mpiexec died", "lost": False} for name in ("node0", "node1")]
    state = after(*lost)
    decision = decision_on_end(state, tmp_path, 0.0)
    assert decision is not None
    assert (decision.again, decision.failure.kind, decision.excludes) == (True, "node", ())
    state.go_on(plan(), decision)
    state.observe(gone("node1"))
    assert (decision_on_end(state, tmp_path, 0.0) or decision).excludes == ("node1",)


def test_what_agents_gave_up_for_a_reason_of_its_own_stays_given_up(tmp_path: Path) -> None:
    told = {**AGAIN, "kind": "config", "again": False, "only_lost": False, "excludes": []}
    assert decision_on_end(after(told, gone("node1")), tmp_path, 0.0) is None
    lost = {**told, "kind": "node", "only_lost": True}
    assert decision_on_end(after(lost, gone("node1")), tmp_path, 0.0) is not None


def test_the_policy_decides_as_in_any_round(tmp_path: Path) -> None:
    unwanted = decision_on_end(after(gone("node1"), found=plan(retry_on=("exit",))), tmp_path, 0.0)
    assert unwanted is not None
    assert (unwanted.again, unwanted.reason[:37]) == (False, "node is not in failure.retry_on (the ")
    done = decision_on_end(after(result("node0", "succeeded"), gone("node1")), tmp_path, 0.0)
    assert done is not None
    assert done.reason == "the ranks of another node have ended already"
    key = gone("node1") | {"exit_code": 77, "message": "host node1: its key is unknown"}
    changed = decision_on_end(after(key), tmp_path, 0.0)
    assert changed is not None
    assert (changed.again, changed.failure.exit_code) == (False, 77)


def test_restarts_before_count_and_so_do_losses_before_ranks_had_started(tmp_path: Path) -> None:
    state = after({**AGAIN, "only_lost": False, "excludes": []}, end("node0", 0, 0, attempt=1), gone("node1"))
    first = decision_on_end(state, tmp_path, 0.0)
    assert first is not None
    assert (first.again, first.attempt, first.wait_s) == (True, 1, 2.0)
    state.decisions[1] = first.as_dict()
    state.go_on(plan(), first)
    state.observe(gone("node0"))  # at once: no rank ran
    last = decision_on_end(state, tmp_path, 0.0)
    assert last is not None
    assert (last.again, last.attempt, last.reason) == (False, 2, "all 2 restarts are used")


def test_a_machine_that_agents_want_left_out_is(tmp_path: Path) -> None:
    told = {**AGAIN, "kind": "node", "only_lost": False, "excludes": ["node1"]}
    decision = decision_on_end(after(told, result("node0", "stopped"), result("node1", "stopped")), tmp_path, 0.0)
    assert decision is not None
    assert (decision.excludes, decision.wait_s) == (("node1",), 1.25)
    both = decision_on_end(after(told, gone("node0")), tmp_path, 0.0)
    assert both is not None
    assert set(both.excludes) == {"node0", "node1"}


def test_time_lost_counts_from_the_first_sign_to_ranks_that_run_again(tmp_path: Path) -> None:
    state = after(gone("node1"))
    state.losses.since_unix_s = 100.0
    for attempt in (0, 1):  # the second start finds another node lost before any rank began
        decision = decision_on_end(state, tmp_path, 0.0)
        assert decision is not None
        state.decisions[attempt] = decision.as_dict()
        state.go_on(plan(), decision)
        if attempt == 0:
            state.observe(gone("node0"))
    started = {"event": "started", "node": "node0", "attempt": 2, "pids": {}, "time_unix_s": 130.0}
    state.observe(started)
    record = outcome_of(state, Verdict(None), [], times_s=(0, 200)).as_dict()
    assert record["lost_s"] == 30.0
    assert [(each["node"], each["down_s"]) for each in record["excluded"]] == [("node1", 0.0), ("node0", 30.0)]


SETS = ("nodes=2", "nproc_per_node=1", "failure.max_restarts=2", "failure.backoff.initial=100ms")


def agents(launcher: "subprocess.Popen[str]") -> list[int]:
    """Process ids of a launcher's agents, in the order of nodes."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(each) for each in children if b"clusters.agent" in Path(f"/proc/{each}/cmdline").read_bytes()]


def lose(job: Path, run_id: str, *nodes: int, spares: int = 1) -> tuple[int, str]:
    """Kills agents of a training, one after the other, each once it has saved anew."""
    launcher = start(job, run_id, *SETS, f"cluster.simulate_nodes={2 + spares}")
    saved = job.parent / "checkpoints"

    def newest() -> int:
        return max((int(each.name[5:]) for each in saved.glob("step-*")), default=0)

    wanted = [1]
    try:
        for node in nodes:
            assert eventually(lambda: newest() >= wanted[-1])
            wanted.append(newest() + 4)  # beyond what may be on its way
            os.kill(agents(launcher)[node], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    assert not list(carriers(own(run_id)))
    return launcher.returncode, output


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of a training that lost nothing."""
    job = write_job(tmp_path_factory.mktemp("calm"), steps=40)
    code, output = finish(job, "r1", "nodes=2", "cluster.simulate_nodes=2")
    assert code == 0, output
    return losses(job, "r1")


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, pytest.param(1, marks=pytest.mark.wide)])  # ranks meet on the first
def test_a_training_that_lost_a_node_ends_with_the_numbers_of_one_that_did_not(
    tmp_path: Path, calm: list[tuple[int, float]], node: int
) -> None:
    job, run_id = write_job(tmp_path / "lost", steps=40), f"lost-{node}-{os.getpid()}"
    code, output = lose(job, run_id, node)
    assert code == 0, output
    assert losses(job, run_id) == calm
    folder = run_dir(job, run_id)
    told = json.loads((folder / "exit.json").read_text())
    assert [each["node"] for each in told["excluded"]] == [f"node{node}"]
    assert [each["excludes"] for each in told["restarts"]] == [[f"node{node}"]]
    assert json.loads((folder / "excluded.json").read_text())[0]["node"] == f"node{node}"
    assert json.loads((folder / "job.json").read_text())["cluster"]["exclude"] == [f"node{node}"]
    assert f"node2 in place of node{node}" in output
    assert "resumed from " in (folder / "logs/rank-0.attempt-1.log").read_text()


@pytest.mark.slow
@pytest.mark.wide
def test_a_second_loss_takes_the_second_spare_and_a_third_ends_the_run(tmp_path: Path) -> None:
    job, run_id = write_job(tmp_path, steps=300), f"thrice-{os.getpid()}"
    code, output = lose(job, run_id, 1, 0, 0, spares=2)
    assert code == 69, output
    told = json.loads((run_dir(job, run_id) / "exit.json").read_text())
    assert [each["node"] for each in told["excluded"]] == ["node1", "node0"]
    assert told["reason"].endswith("not started again: all 2 restarts are used")
    assert told["attempts"] == 3


@pytest.mark.slow
def test_without_a_spare_the_run_ends_and_names_the_node_and_what_to_do(tmp_path: Path) -> None:
    job, run_id = write_job(tmp_path, steps=300), f"bare-{os.getpid()}"
    code, output = lose(job, run_id, 1, spares=0)
    assert code == 69, output
    assert "the agent of node1 died (SIGKILL)" in output
    assert "not started again: node1 cannot be left out: the job wants 2 nodes, and 1 of the 2 hosts it names" in output
    assert "put more into cluster.simulate_nodes than `nodes` needs" in output


@pytest.mark.slow
def test_a_machine_at_fault_twice_is_left_out_and_the_run_goes_on_elsewhere(tmp_path: Path) -> None:
    script = (
        "import os, time\n"
        "host, attempt = os.environ['MESHWRIGHT_HOST'], int(os.environ['MESHWRIGHT_ATTEMPT'])\n"
        "print('on', host, flush=True)\n"
        "if host == 'node1': raise RuntimeError('CUDA error: uncorrectable ECC error encountered')\n"
        "time.sleep(600 if attempt < 2 else 0)\n"
    )
    failure = {"max_restarts": 3, "exclude_bad_nodes": 2, "backoff": {"initial": "100ms"}, "shutdown_grace": "1s"}
    cluster = {"simulate_nodes": 3}
    done = run(launch_job(tmp_path, script, nodes=2, nproc_per_node=1, failure=failure, cluster=cluster))
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / f"runs/j/{RUN}/exit.json").read_text())
    assert [(each["kind"], each["host"], each["excludes"]) for each in told["restarts"]] == [
        ("node", "node1", []),
        ("node", "node1", ["node1"]),
    ]
    assert [(each["node"], each["attempt"]) for each in told["excluded"]] == [("node1", 1)]
    assert "uncorrectable ECC error" in told["excluded"][0]["why"]
    assert (told["attempts"], "node2:1 | on node2" in done.stdout) == (3, True)


def test_a_run_that_cannot_be_followed_leaves_a_page_that_does_not_wait_for_another(tmp_path: Path) -> None:
    followed = Run(
        load_job(Path("examples/quickstart.yaml")).job, replace(plan(), run_dir=str(tmp_path)), (0,), (), 1.0
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')

    def start(*_: object) -> Handle:
        write_page(tmp_path, state="running", live=Live(0, 1.0))
        assert "refresh" in (tmp_path / "page.html").read_text()
        raise UnavailableError("none is there")

    with pytest.raises(UnavailableError, match="none is there"):
        follow(followed, start)
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 69
    page = (tmp_path / "page.html").read_text()
    assert ("refresh" in page, "none is there" in page) == (False, True)
