"""A run that shrank may grow again: at a restart, with nodes that were only lost and that answer again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from meshwright.clusters.base import StartPlan, StartRequest
from meshwright.clusters.blame import Verdict
from meshwright.clusters.contract import Cluster, Handle
from meshwright.clusters.errors import FewerNodesError, UnavailableError
from meshwright.clusters.ray import RayOptions, plan_ray
from meshwright.clusters.request import Secret
from meshwright.clusters.ssh import SshOptions, plan_ssh
from meshwright.launch import relaunch as module
from meshwright.launch.engines import ssh_hosts
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.preflight import PreflightError
from meshwright.launch.registry import cluster_of
from meshwright.launch.regroup import can_return, nodes_back
from meshwright.launch.relaunch import Relaunch
from meshwright.launch.report import outcome_of
from meshwright.launch.request import request_of
from meshwright.launch.spares import without
from meshwright.launch.supervise import Interrupts, RunState
from meshwright.parallel.errors import MeshwrightError
from tests.launch.test_restarts import AGAIN
from tests.launch.test_supervise import gone, result

JOB = """
name: j
command: [python, -c, pass]
nodes: {min: 2, max: 3}
nproc_per_node: 1
parallel: {dp: 3}
failure: {max_restarts: 5, backoff: {initial: 0s}}
cluster: {type: ssh, hosts: [{name: a}, {name: b}, {name: c}]}
"""


class Started:
    """Instead of hosts: what was planned and started."""

    def __init__(self, loaded: LoadedJob, plans: list[StartPlan]) -> None:
        self._hosts, self._plans = ssh_hosts(cast(Any, loaded.job.cluster)), plans

    def plan(self, request: StartRequest) -> StartPlan:
        return plan_ssh(request, self._hosts, SshOptions())

    def back(self, names: Sequence[str]) -> tuple[str, ...]:
        raise AssertionError("a test says who is back")

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        self._plans.append(plan)
        return cast(Handle, object())


class Case:
    """A run on three hosts whose agents say what a test wants."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "job.yaml").write_text(JOB)
        self.loaded, self.plans = load_job(folder / "job.yaml"), list[StartPlan]()
        self.asked: list[tuple[str, ...]] = []
        self.answering: tuple[str, ...] = ()
        monkeypatch.setattr(module, "cluster_of", lambda loaded: Started(loaded, self.plans))
        request = request_of(self.loaded, "r1", base=folder)
        request.run_dir.mkdir(parents=True)
        self.run_dir = request.run_dir
        self.relaunch = Relaunch(self.loaded, folder, request, 0.0, self._back)
        self.state = RunState(Started(self.loaded, []).plan(request))

    def _back(self, loaded: LoadedJob, names: Sequence[str]) -> tuple[str, ...]:
        assert loaded is self.loaded
        self.asked.append(tuple(names))
        return tuple(name for name in names if name in self.answering)

    def after(self, *events: dict[str, Any]) -> list[str]:
        """Names of the nodes that are started after some events; empty where none are."""
        for event in events:
            self.state.observe(event)
        before = len(self.plans)
        self.relaunch(self.state, Interrupts(), lambda state: None)
        return [node.name for node in self.plans[-1].nodes] if len(self.plans) > before else []

    def failed(self, node: str, attempt: int, **told: Any) -> tuple[dict[str, Any], ...]:
        """A rank failed, and agents ended for the launcher to start others."""
        ends = (result(node, "stopped") for node in ("a", "c"))
        return ({**AGAIN, "attempt": attempt, "host": node, "only_lost": False, "excludes": [], **told}, *ends)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, monkeypatch)


def test_a_host_that_is_back_takes_part_from_the_next_restart_on(case: Case) -> None:
    assert case.after(gone("b", 255)) == ["a", "c"]
    assert case.plans[0].limits.regroup, "agents leave the next restart to the launcher"
    assert case.plans[0].world_size == 2
    case.answering = ("b",)
    assert case.after(*case.failed("a", 1)) == ["a", "b", "c"]
    assert not case.plans[1].limits.regroup
    assert case.asked == [(), ("b",)]
    first, second = (case.state.decisions[attempt] for attempt in (0, 1))
    assert (first["nodes"], second["nodes"]) == ([3, 2], [2, 3])
    assert first["reason"].endswith("it shrinks from 3 nodes to 2, without b (dp=2, num_microbatches=2)")
    assert second["reason"].endswith("it grows from 2 nodes to 3, with b (dp=3, num_microbatches=1)")
    told, job = (json.loads((case.run_dir / name).read_text()) for name in ("excluded.json", "job.json"))
    assert [(each["node"], "back_unix_s" in each) for each in told] == [("b", True)]
    assert job["parallel"]["dp"] == 3


def test_no_secret_of_what_is_told_of_an_end_is_in_the_plan_of_the_next_start(case: Case) -> None:
    program = replace(case.relaunch.request.program, secrets=(Secret("TOKEN", "from_env TOKEN", "hunter22"),))
    case.relaunch = replace(case.relaunch, request=replace(case.relaunch.request, program=program))
    assert case.after({**gone("b"), "exit_code": 69, "message": "ValueError: hunter22 refused"}) == ["a", "c"]
    (before,) = case.plans[-1].limits.past
    assert before.failure.evidence == "ValueError: *** refused"
    assert all("hunter22" not in path.read_text() for path in (case.run_dir / "plan.json", case.run_dir / "job.json"))


def test_a_host_that_stays_away_is_asked_again_and_one_lost_twice_is_not(case: Case) -> None:
    assert case.after(gone("b", 255)) == ["a", "c"]
    assert case.after(*case.failed("a", 1)) == ["a", "c"]
    assert case.state.decisions[1]["reason"].endswith("on the same nodes")
    case.answering = ("b",)
    assert case.after(*case.failed("a", 2)) == ["a", "b", "c"]
    assert case.after(gone("b", 255)) == ["a", "c"]
    assert case.after(*case.failed("a", 4)) == ["a", "c"]
    assert case.asked == [(), ("b",), ("b",), (), ()]


def test_a_machine_at_fault_stays_out_though_it_answers(case: Case) -> None:
    case.answering = ("b",)
    assert case.after(*case.failed("b", 0, kind="node", excludes=["b"])) == ["a", "c"]
    assert case.after(*case.failed("a", 1)) == ["a", "c"]
    assert case.asked == [(), ()]


@pytest.mark.parametrize("error", [UnavailableError("Ray did not place 2 nodes"), PreflightError("gpu9 not fit")])
def test_a_start_that_cannot_be_had_keeps_what_ended_the_run(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: MeshwrightError
) -> None:
    def refuse(self: Started, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        raise error

    assert case.after(gone("b", 255)) == ["a", "c"]
    names = ("plan.json", "job.json", "excluded.json")
    before = [(case.run_dir / name).read_text() for name in names]
    plan = case.state.plan
    monkeypatch.setattr(Started, "start", refuse)
    assert case.after(*case.failed("a", 1, evidence="it went up in smoke", exit_code=7)) == []
    told = case.state.decisions[1]
    assert (told["again"], told["reason"], told["wait_s"]) == (False, str(error), 0.0)
    assert (case.state.plan, case.state.attempt) == (plan, 1)
    assert [(case.run_dir / name).read_text() for name in names] == before
    outcome = outcome_of(case.state, Verdict(None), [], times_s=(0.0, 1.0))
    assert (outcome.exit_code, outcome.attempts) == (7, 2)
    assert outcome.reason == f"it went up in smoke; not started again: {error}"


def test_a_lost_node_that_nobody_can_stand_in_for_keeps_its_words(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Started, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        raise UnavailableError("none is there")

    monkeypatch.setattr(Started, "start", refuse)
    assert case.after(gone("b", 255)) == []
    outcome = outcome_of(case.state, Verdict(None), [], times_s=(0.0, 1.0))
    assert outcome.exit_code == 69
    assert outcome.reason == (
        "the agent of b died (exit code 255); its ranks were ended; not started again: none is there"
    )


def test_nodes_of_another_start_are_examined_as_those_of_the_first(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def examined(cluster: Started, loaded: LoadedJob, base: Path) -> Started:
        asked.append(base)
        return cluster

    monkeypatch.setattr(module, "examined_at_start", examined)
    assert case.after(gone("b", 255)) == ["a", "c"]
    assert asked == [case.run_dir.parents[2]]


def test_too_few_nodes_end_the_run_with_their_number_and_what_to_do(case: Case) -> None:
    assert case.after(gone("b", 255)) == ["a", "c"]
    assert case.after(gone("c", 255)) == []
    told = case.state.decisions[1]
    assert told["again"] is False
    assert told["reason"].startswith("c cannot be left out: the job wants at least 2 nodes, and 1 of the 2 hosts")
    assert "put more into cluster.hosts" in told["reason"]


def test_only_machines_of_elastic_jobs_that_have_too_few_may_come_back(tmp_path: Path, case: Case) -> None:
    cluster = cluster_of(case.loaded)
    assert [can_return(cluster, each) for each in (case.loaded, without(case.loaded, ("b",)))] == [False, True]
    path = tmp_path / "local.yaml"
    path.write_text("name: j\ncommand: [python]\nnodes: {min: 1, max: 2}\ncluster: {simulate_nodes: 1}\n")
    assert not can_return(cluster_of(load_job(path)), load_job(path))
    assert nodes_back(load_job(path), ("node1",)) == ()


def test_hosts_are_asked_by_the_ssh_of_the_job(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\ncase \"$*\" in *' b '*) exit 255;; esac\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert nodes_back(case.loaded, ("b", "c")) == ("c",)
    assert nodes_back(case.loaded, ()) == ()


def test_what_the_cluster_left_out_by_itself_stays_out(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.yaml").write_text("name: j\ncommand: [python]\nnodes: 2\ncluster: {type: ray}\n")
    ray, jobs = load_job(tmp_path / "ray.yaml"), list[LoadedJob]()
    case.relaunch = replace(case.relaunch, loaded=ray, back=lambda loaded, names: ())

    def of(loaded: LoadedJob) -> Started:
        jobs.append(loaded)
        return Started(case.loaded, case.plans)

    monkeypatch.setattr(module, "cluster_of", of)
    told = {"why": "disk: full", "attempt": -1, "step": None, "lost": False, "time_unix_s": 1.0}
    assert case.after({"event": "left_out", "node": "gpu9", **told}, gone("b", 255))
    assert jobs[-1].job.as_dict()["cluster"]["exclude"] == ["gpu9", "b"]


RAY = """
name: j
command: [python, -c, pass]
nodes: {min: 1, max: 3}
nproc_per_node: 1
parallel: {dp: 3}
failure: {max_restarts: 5, backoff: {initial: 0s}}
cluster: {type: ray}
"""


class Knows(Started):
    """A cluster that knows its nodes, and calls them n0, n1, ..."""

    has, gives = 3, 3

    def __init__(self, loaded: LoadedJob, plans: list[StartPlan], run_dir: Path) -> None:
        del loaded
        self._plans, self._run_dir = plans, run_dir

    def count(self, request: StartRequest) -> int:
        return self.has

    def plan(self, request: StartRequest) -> StartPlan:
        return plan_ray(request, RayOptions())

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        told = json.loads((self._run_dir / "job.json").read_text()) if (self._run_dir / "job.json").exists() else None
        assert told is None or (told["nodes"], told["parallel"]["dp"]) == (len(plan.nodes), len(plan.nodes))
        if len(plan.nodes) > self.gives:
            raise FewerNodesError(f"Ray did not place {len(plan.nodes)} nodes", len(plan.nodes) - 1)
        return super().start(plan, secrets)


class RayCase(Case):
    """A run on a cluster that knows its nodes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "job.yaml").write_text(RAY)
        self.loaded, self.plans, self.asked, self.answering = load_job(folder / "job.yaml"), [], [], ()
        request = request_of(self.loaded, "r1", base=folder)
        request.run_dir.mkdir(parents=True)
        self.run_dir = request.run_dir
        monkeypatch.setattr(Knows, "has", 3)
        monkeypatch.setattr(Knows, "gives", 3)
        monkeypatch.setattr(module, "cluster_of", lambda loaded: Knows(loaded, self.plans, self.run_dir))
        self.relaunch = Relaunch(self.loaded, folder, request, 0.0, self._back)
        self.cluster = Knows(self.loaded, self.plans, self.run_dir)
        self.state = RunState(self.cluster.plan(request))

    def begin(self) -> int:
        """Starts it for the first time; the number of nodes."""
        self.relaunch.first(cast(Cluster, self.cluster), self.state, Interrupts())
        return len(self.state.plan.nodes)


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayCase:
    return RayCase(tmp_path, monkeypatch)


def test_a_run_on_a_cluster_that_knows_its_nodes_shrinks_and_grows_with_them(
    ray: RayCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ray.state.plan
    assert (ray.begin(), ray.state.plan is whole, ray.plans[0].limits.regroup) == (3, True, False)
    assert not (ray.run_dir / "job.json").exists(), "it was written for so many"
    monkeypatch.setattr(Knows, "has", 2)
    assert len(ray.after(gone("node1", 69))) == 2
    assert (ray.plans[1].world_size, ray.plans[1].limits.regroup) == (2, True), "a node may join"
    monkeypatch.setattr(Knows, "has", 4)
    assert len(ray.after(*ray.failed("node0", 1))) == 3
    assert not ray.plans[2].limits.regroup
    first, second = (ray.state.decisions[attempt] for attempt in (0, 1))
    assert (first["nodes"], second["nodes"]) == ([3, 2], [2, 3])
    assert first["reason"].endswith("it shrinks from 3 nodes to 2, without node1 (dp=2, num_microbatches=2)")
    assert second["reason"].endswith("it grows from 2 nodes to 3 (dp=3, num_microbatches=1)")
    assert [each.nodes for each in ray.plans[2].limits.past] == [(3, 2), (2, 3)]
    assert capsys.readouterr().err == ""


def test_a_first_start_on_fewer_nodes_is_said_kept_and_may_grow(
    ray: RayCase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Knows, "has", 2)
    assert ray.begin() == 2
    assert ray.plans == [ray.state.plan]
    assert (ray.state.plan.limits.regroup, ray.state.plan.limits.fewest_nodes) == (True, 1)
    told, plan = (json.loads((ray.run_dir / name).read_text()) for name in ("job.json", "plan.json"))
    assert (told["nodes"], told["parallel"]["num_microbatches"], plan["world_size"]) == (2, 2, 2)
    assert capsys.readouterr().err == (
        "meshwright: ranks start on 2 of at most 3 nodes, as many as ray has for them (dp=2, num_microbatches=2)\n"
    )


def test_what_a_cluster_does_not_give_is_what_the_record_has(ray: RayCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Knows, "gives", 2)
    assert ray.begin() == 2
    assert json.loads((ray.run_dir / "job.json").read_text())["parallel"]["dp"] == 2
    monkeypatch.setattr(Knows, "gives", 1)
    assert len(ray.after(gone("node1", 69))) == 1
    told = ray.state.decisions[0]
    assert told["nodes"] == [2, 1]
    assert told["reason"].endswith("it shrinks from 2 nodes to 1, without node1 (1 ranks)")
    assert ray.plans[-1].limits.past[-1].nodes == (2, 1)
    monkeypatch.setattr(Knows, "gives", 0)
    before = [(ray.run_dir / name).read_text() for name in ("plan.json", "job.json")]
    assert ray.after(gone("node0", 69)) == []
    assert ray.state.decisions[1]["reason"] == "Ray did not place 1 nodes"
    assert [(ray.run_dir / name).read_text() for name in ("plan.json", "job.json")] == before


def test_a_cluster_that_does_not_say_how_many_it_has_is_found_by_the_start(
    ray: RayCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Knows, request: StartRequest) -> int:
        raise UnavailableError("no Ray cluster at 'auto'")

    assert ray.begin() == 3
    monkeypatch.setattr(Knows, "count", refuse)
    assert ray.after(gone("node1", 69)) == []
    assert (ray.state.decisions[0]["again"], ray.state.decisions[0]["reason"]) == (False, "no Ray cluster at 'auto'")
