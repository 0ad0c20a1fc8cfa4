"""What was decided before travels with a plan, so that other agents go on counting where the last ones ended."""

import json
from dataclasses import asdict
from pathlib import Path

from meshwright.clusters.base import StartPlan
from meshwright.clusters.failure import Failure
from meshwright.clusters.local import Machine, plan_local
from meshwright.clusters.request import Limits, Program, StartRequest
from meshwright.clusters.retry import Decision
from meshwright.clusters.rounds import Rounds
from meshwright.clusters.saved import plan_from

PAST = (
    Decision(True, "1 left", 1.0, 0, Failure("b", "node", 69, evidence="cut", lost=True), 12, ("b",)),
    Decision(True, "0 left", 2.0, 1, Failure("a", "exit", 3, 0), 14),
)


def plan() -> StartPlan:
    request = StartRequest("j", "r1", Path("/r1"), Program(("true",), Path("/")), 2, limits=Limits(3, past=PAST))
    return plan_local(request, Machine("box", 2))


def test_a_plan_with_a_past_comes_back_from_its_saved_form_as_it_was() -> None:
    assert plan_from(json.loads(json.dumps(plan().as_dict()))) == plan()


def test_agents_count_restarts_from_those_before_them() -> None:
    found = Rounds(json.loads(json.dumps(asdict(plan()))), 0)
    assert found.history == list(PAST)
    assert found.left == 1
