"""Ray: the plan, and what can never be placed."""

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.clusters import ray as module
from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.ray import RayCluster, RayOptions, plan_ray, why_infeasible
from meshwright.clusters.ray_line import RayLine, agent_class, answered
from meshwright.clusters.ray_nodes import through_actors
from meshwright.clusters.reaching import Reached

REQUEST = StartRequest("j", "r", Path("/runs/r"), Program(("x",), Path("/w")), 2, None, 16, 8)


def test_a_plan_says_what_is_asked_of_each_node() -> None:
    plan = plan_ray(REQUEST, RayOptions("10.0.0.1:6379", 12))
    assert (plan.cluster, plan.variant) == ("ray", "at 10.0.0.1:6379, 2 x {CPU: 12, GPU: 8}, STRICT_SPREAD")
    assert [node.ranks for node in plan.nodes] == [tuple(range(8)), tuple(range(8, 16))]
    assert plan_ray(replace(REQUEST, ranks_per_node="gpu"), RayOptions()).world_size == 16
    with pytest.raises(UnavailableError, match="write a number"):
        plan_ray(replace(REQUEST, ranks_per_node="auto"), RayOptions())


@pytest.mark.parametrize(
    ("nodes", "feasible"),
    [
        ([{"CPU": 8, "GPU": 8}] * 2, True),
        ([{"CPU": 8, "GPU": 8}] * 3, True),
        ([{"CPU": 16, "GPU": 16}], False),
        ([{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 4}], False),
        ([], False),
    ],
)
def test_a_spread_needs_as_many_nodes_that_each_have_enough(nodes: list[dict[str, float]], feasible: bool) -> None:
    assert (why_infeasible({"CPU": 1, "GPU": 8}, 2, nodes) is None) == feasible


def alive(node: str, address: str, *, lives: bool = True) -> dict[str, Any]:
    return {"NodeID": node, "NodeManagerAddress": address, "Alive": lives, "Resources": {"CPU": 16.0, "GPU": 8.0}}


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

    def placed(count: int) -> tuple[str, list[str]]:
        calls.append(("place", count, cluster._options.exclude))
        return f"group{len(calls)}", ["one", "two"]

    def admit(reached: Reached) -> list[dict[str, Any]]:
        return [{"node": "10.0.0.2-b", "why": "disk: full", "attempt": -1}] if len(calls) == 1 else []

    monkeypatch.setattr(cluster, "_placed", placed)
    monkeypatch.setattr(module, "give_back", lambda group: calls.append(("back", group)))
    monkeypatch.setattr(module, "through_actors", lambda actors: Reached(()))
    monkeypatch.setattr(module, "RayLine", lambda actor, argv: actor)
    cluster.admit = admit
    group, begun, told = cluster._begun(plan)
    assert (group, begun) == ("group3", ["one", "two"])
    assert [(each["event"], each["node"], each["attempt"]) for each in told] == [("left_out", "10.0.0.2-b", -1)]
    assert calls == [
        ("place", 2, ("10.0.0.9",)),
        ("back", "group1"),
        ("place", 2, ("10.0.0.9", "10.0.0.2-b")),
    ]


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
