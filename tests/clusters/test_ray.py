"""Ray: the plan, and what can never be placed."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.clusters import ray as module
from meshwright.clusters import ray_nodes
from meshwright.clusters.base import Limits, Program, StartRequest
from meshwright.clusters.errors import FewerNodesError, UnavailableError
from meshwright.clusters.failure import Failure
from meshwright.clusters.ray import RayCluster, RayOptions, plan_ray
from meshwright.clusters.ray_line import RayLine, agent_class, answered
from meshwright.clusters.ray_nodes import through_actors
from meshwright.clusters.reaching import Reached
from meshwright.clusters.retry import Decision
from tests.clusters.test_ray_fit import alive

REQUEST = StartRequest("j", "r", Path("/runs/r"), Program(("x",), Path("/w")), 2, None, 16, 8)


def test_a_plan_says_what_is_asked_of_each_node() -> None:
    plan = plan_ray(REQUEST, RayOptions("10.0.0.1:6379", 12))
    assert (plan.cluster, plan.variant) == ("ray", "at 10.0.0.1:6379, 2 x {CPU: 12, GPU: 8}, STRICT_SPREAD")
    assert [node.ranks for node in plan.nodes] == [tuple(range(8)), tuple(range(8, 16))]
    assert plan_ray(replace(REQUEST, ranks_per_node="gpu"), RayOptions()).world_size == 16
    with pytest.raises(UnavailableError, match="write a number"):
        plan_ray(replace(REQUEST, ranks_per_node="auto"), RayOptions())


@pytest.mark.parametrize("exclude", ["10.0.0.2", "bbbbbbbbcc", "10.0.0.2-bbbbbbbb"])
def test_nodes_that_are_left_out_do_not_count_by_whatever_name(monkeypatch: pytest.MonkeyPatch, exclude: str) -> None:
    nodes = [alive("aaaaaaaacc", "10.0.0.1"), alive("bbbbbbbbcc", "10.0.0.2"), alive("d", "10.0.0.3", lives=False)]
    monkeypatch.setattr(module, "attached", lambda address: SimpleNamespace(nodes=lambda: nodes))
    monkeypatch.setattr(module, "is_open", lambda address: False)
    whole = RayCluster(RayOptions("a:1"))
    whole.check(whole.plan(REQUEST))
    cluster = RayCluster(RayOptions("a:1", exclude=("10.0.0.9", exclude)))
    plan = cluster.plan(REQUEST)
    with pytest.raises(UnavailableError, match=f"of 1 nodes 1 has that much: .*; left out: 10.0.0.9, {exclude}$"):
        cluster.check(plan)


def test_a_name_that_no_node_has_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [alive("aaaaaaaacc", "10.0.0.1"), alive("bbbbbbbbcc", "10.0.0.2"), alive("d", "10.0.0.3", lives=False)]
    monkeypatch.setattr(module, "attached", lambda address: SimpleNamespace(nodes=lambda: nodes))
    monkeypatch.setattr(module, "is_open", lambda address: False)
    cluster = RayCluster(RayOptions("a:1", exclude=("10.0.0.3-d", "gpu2")))
    cluster.check(cluster.plan(REQUEST))
    assert capsys.readouterr().err == "meshwright: cluster.exclude: this Ray cluster has no node gpu2\n"


def test_a_node_that_does_not_pass_is_given_back_and_another_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, calls = RayCluster(RayOptions("a:1", exclude=("10.0.0.9",))), list[Any]()
    plan = cluster.plan(REQUEST)

    def placed(count: int, limits: Limits) -> tuple[list[str], list[str]]:
        assert limits.fewest_nodes is None
        calls.append(("place", count, cluster._options.exclude))
        return [f"group{len(calls)}"], ["one", "two"]

    def admit(reached: Reached) -> list[dict[str, Any]]:
        return [{"node": "10.0.0.2-b", "why": "disk: full", "attempt": -1}] if len(calls) == 1 else []

    monkeypatch.setattr(cluster, "_placed", placed)
    monkeypatch.setattr(module, "give_back", lambda group: calls.append(("back", group)))
    monkeypatch.setattr(module, "through_actors", lambda actors: Reached(()))
    monkeypatch.setattr(module, "RayLine", lambda actor, argv: actor)
    cluster.admit = admit
    group, begun, told = cluster._begun(plan)
    assert (group, begun) == (["group3"], ["one", "two"])
    assert [(each["event"], each["node"], each["attempt"]) for each in told] == [("left_out", "10.0.0.2-b", -1)]
    assert calls == [
        ("place", 2, ("10.0.0.9",)),
        ("back", "group1"),
        ("place", 2, ("10.0.0.9", "10.0.0.2-b")),
    ]


ELASTIC = replace(REQUEST, num_nodes=3, num_ranks=24, limits=Limits(fewest_nodes=2))
THREE = [alive("aaaaaaaacc", "10.0.0.1"), alive("bbbbbbbbcc", "10.0.0.2"), alive("cccccccccc", "10.0.0.3")]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Three nodes as Ray tells of them, to be changed; all that they have is free."""
    nodes = [dict(each) for each in THREE]

    def free() -> dict[str, float]:
        living = [each["Resources"] for each in nodes if each["Alive"]]
        return {name: sum(each[name] for each in living) for name in ("CPU", "GPU")}

    pretended = SimpleNamespace(nodes=lambda: nodes, available_resources=free)
    monkeypatch.setattr(module, "attached", lambda address: pretended)
    monkeypatch.setattr(module, "is_open", lambda address: False)
    monkeypatch.setattr(module, "give_back", lambda *groups: None)
    return nodes


def test_nodes_that_live_fit_and_are_not_left_out_are_counted(three: list[dict[str, Any]]) -> None:
    assert RayCluster(RayOptions("a:1")).count(ELASTIC) == 3
    assert RayCluster(RayOptions("a:1", exclude=("10.0.0.2-bbbbbbbb",))).count(ELASTIC) == 2
    three[2] |= {"Resources": {"CPU": 64.0}}
    assert RayCluster(RayOptions("a:1", exclude=("10.0.0.2",))).count(ELASTIC) == 1
    three[0] |= {"Alive": False}
    assert RayCluster(RayOptions("a:1")).count(ELASTIC) == 1


def test_lost_nodes_are_there_again_only_under_the_name_of_one_that_lives(three: list[dict[str, Any]]) -> None:
    three[1] |= {"Alive": False}
    names = ("10.0.0.1-aaaaaaaa", "10.0.0.2-bbbbbbbb", "10.0.0.3-dddddddd")
    assert RayCluster(RayOptions("a:1")).back(names) == names[:1]


def test_an_elastic_run_is_refused_where_fewer_nodes_than_its_min_could_ever_run_it(
    three: list[dict[str, Any]],
) -> None:
    cluster = RayCluster(RayOptions("a:1"))
    plan = cluster.plan(ELASTIC)
    three[0] |= {"Alive": False}
    cluster.check(plan)
    three[1] |= {"Alive": False}
    with pytest.raises(UnavailableError, match=r"this run on nodes.min = 2 nodes: asked for 2 nodes with"):
        cluster.check(plan)


def test_an_elastic_run_does_not_wait_for_nodes_that_are_not_there(
    three: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    placements, cluster = Placements(monkeypatch, lambda count, seconds: False), RayCluster(RayOptions("a:1"))
    plan = cluster.plan(ELASTIC)
    three[0] |= {"Alive": False}
    with pytest.raises(FewerNodesError, match="of Ray's nodes 2 can run it") as raised:
        cluster._begun(plan)
    assert (raised.value.have, placements.asked) == (2, [])


def test_a_node_that_does_not_pass_shrinks_an_elastic_run(
    three: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    cluster, answers = RayCluster(RayOptions("a:1")), [[{"node": "10.0.0.2-bbbbbbbb", "why": "disk: full"}], []]
    placements = Placements(monkeypatch, lambda count, seconds: True)
    monkeypatch.setattr(module, "through_actors", lambda actors: Reached(()))
    monkeypatch.setattr(module, "RayLine", lambda actor, argv: actor)
    cluster.admit = lambda reached: answers.pop(0)
    with pytest.raises(FewerNodesError, match=r"of Ray's nodes 2 can run it; left out: 10.0.0.2-bbbbbbbb"):
        cluster._begun(cluster.plan(ELASTIC))
    _, begun, told = cluster._begun(cluster.plan(replace(ELASTIC, num_nodes=2, num_ranks=16)))
    assert (len(begun), [each["node"] for each in told]) == (2, ["10.0.0.2-bbbbbbbb"]), "who was left out is told"
    assert [(count, banned) for count, banned, _ in placements.asked] == [(3, ""), (2, "!in(bbbbbbbbcc)")]
    del three


class Placements:
    """Instead of placement groups: what was asked of them, and whether they are placed.

    Args:
        monkeypatch: takes the place of Ray's.
        answer: number of nodes and seconds -> whether they are placed in that time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: "Callable[[int, float], bool]") -> None:
        self.asked: list[tuple[int, str, float]] = []
        self.groups: list[Any] = []
        self.back: list[Any] = []

        def group(bundles: list[Any], *, strategy: str, bundle_label_selector: Any) -> Any:
            banned = bundle_label_selector[0]["ray.io/node-id"] if bundle_label_selector else ""

            def wait(timeout_seconds: float) -> bool:
                self.asked.append((len(bundles), banned, timeout_seconds))
                return answer(len(bundles), timeout_seconds)

            self.groups.append(SimpleNamespace(wait=wait, bundle_specs=bundles))
            return self.groups[-1]

        made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=object))
        # ray.util has a function of that name
        monkeypatch.setattr(import_module("ray.util.placement_group"), "placement_group", group)
        table = {"bundles_to_node_id": {0: "own"}}
        monkeypatch.setattr(import_module("ray.util.placement_group"), "placement_group_table", lambda _: table)
        monkeypatch.setattr(module, "give_back", lambda *groups: self.back.extend(groups))
        monkeypatch.setattr("ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy", lambda *_, **__: None)
        monkeypatch.setattr(ray_nodes, "agent_class", lambda: None)
        monkeypatch.setattr(module.attached(""), "remote", lambda kind: made, raising=False)


def test_nodes_that_others_hold_are_waited_for_once_and_then_fewer_tried_down_to_the_min(
    three: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    placements = Placements(monkeypatch, lambda count, seconds: False)
    cluster = RayCluster(RayOptions("a:1", ready_timeout_s=60.0))
    free = {"CPU": 48.0, "GPU": 16.0}
    monkeypatch.setattr(module.attached(""), "available_resources", lambda: free)
    with pytest.raises(FewerNodesError, match=r"did not place 3 nodes with {.*} within 60 s; free") as caught:
        cluster._begun(cluster.plan(ELASTIC))
    assert caught.value.have == 2
    least = cluster.plan(replace(ELASTIC, num_nodes=2, num_ranks=16))
    with pytest.raises(UnavailableError, match=r"did not place 2 nodes with .* \(nodes.min\) within 10 s") as refused:
        cluster._begun(least)
    assert not isinstance(refused.value, FewerNodesError)
    assert [(count, seconds) for count, _, seconds in placements.asked] == [(3, 60.0), (2, 10.0)]
    rigid = RayCluster(RayOptions("a:1"))
    with pytest.raises(UnavailableError, match=r"3 nodes .* within 60 s; .*; wait for other jobs") as stated:
        rigid._begun(rigid.plan(replace(ELASTIC, limits=Limits())))
    assert not isinstance(stated.value, FewerNodesError)
    del three


def grown(before: int, *excludes: str, now: int = 3) -> Limits:
    """Of an elastic run of which an attempt on so many nodes failed."""
    failed = Decision(True, "exit", 1.0, 0, Failure("a"), excludes=excludes, nodes=(before, now))
    return Limits(fewest_nodes=1, past=(failed,))


@pytest.mark.parametrize(("ready_s", "for_more_s"), [(60.0, 10.0), (5.0, 5.0)])
def test_a_run_asks_for_more_nodes_only_besides_those_it_had_and_not_for_long(
    three: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, ready_s: float, for_more_s: float
) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    placements = Placements(monkeypatch, lambda count, seconds: count == 2)
    cluster = RayCluster(RayOptions("a:1", ready_timeout_s=ready_s))
    plan = cluster.plan(replace(ELASTIC, limits=grown(2)))
    with pytest.raises(FewerNodesError, match=r"1 nodes with {.*} besides the 2 it has within") as caught:
        cluster._placed(3, plan.limits)
    held, more = placements.groups
    assert (caught.value.have, placements.back) == (2, [more]), "what it had is not given back"
    groups, actors = cluster._placed(2, replace(plan.limits, past=()))
    assert (groups, len(actors), placements.groups) == ([held], 2, [held, more]), "nor asked for again"
    assert placements.asked == [(2, "", ready_s), (1, "!in(own)", for_more_s)]
    del three


def test_a_run_that_gets_more_nodes_has_an_actor_on_each(
    three: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    placements = Placements(monkeypatch, lambda count, seconds: True)
    cluster = RayCluster(RayOptions("a:1"))
    groups, actors = cluster._placed(3, cluster.plan(replace(ELASTIC, limits=grown(2, "lost"))).limits)
    assert (groups, len(actors), placements.back) == (placements.groups, 3, [])
    assert [count for count, _, _ in placements.asked] == [1, 2], "of two nodes one was lost"
    del three


def test_what_a_run_had_goes_back_where_it_can_use_fewer_only_or_fails_otherwise(
    three: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    placements = Placements(monkeypatch, lambda count, seconds: len(placements.groups) != 2)
    cluster = RayCluster(RayOptions("a:1"))
    with pytest.raises(FewerNodesError):
        cluster._placed(3, cluster.plan(replace(ELASTIC, limits=grown(2))).limits)
    first, more = placements.groups
    assert cluster._placed(1, Limits(fewest_nodes=1))[0] == placements.groups[2:]
    assert placements.back == [more, first]
    monkeypatch.setattr(module, "actors_in", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cluster._placed(2)
    assert placements.back[2:] == placements.groups[3:]
    del three


class Called:
    """An actor, as far as it is asked."""

    def __init__(self, place: tuple[str, str]) -> None:
        self.__ray_call__ = SimpleNamespace(remote=lambda act: place)


def test_nodes_have_the_names_that_runs_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    monkeypatch.setattr(ray, "get", lambda asked, timeout=None: asked)
    actors = [Called(("10.0.0.1", "aaaaaaaacc")), Called(("10.0.0.1", "bbbbbbbbcc"))]
    assert [each.name for each in through_actors(actors).reaches] == ["10.0.0.1-aaaaaaaa", "10.0.0.1-bbbbbbbb"]


def test_what_ray_cannot_answer_for_is_a_node_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    errors = [ray.exceptions.ActorDiedError(), ray.exceptions.GetTimeoutError("late")]

    def get(asked: object, timeout: float | None = None) -> object:
        assert timeout is not None, "for ever"
        raise errors.pop(0)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(UnavailableError, match=r"^a node that Ray has placed was lost: The actor died"):
        answered(0)
    with pytest.raises(UnavailableError, match="does not answer within 120 s"):
        answered(0)


def test_a_probe_that_stays_is_ended_in_its_actor_which_stays() -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    inside = agent_class()()
    inside._agent = subprocess.Popen(["sleep", "600"], start_new_session=True)
    line = RayLine.__new__(RayLine)
    line._actor = SimpleNamespace(__ray_call__=SimpleNamespace(remote=lambda act: act(inside)))
    line.end()
    assert inside.wait() == -9
    line.end()
