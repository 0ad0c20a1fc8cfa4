"""What a failed attempt is followed by: pure decisions from evidence, the same on every node."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.clusters.failure import KINDS, Failure
from meshwright.clusters.retry import (
    Decision,
    RetryPolicy,
    decide,
    decision_from,
    policy_from,
    told_decision,
    wait_of,
)

POLICY = RetryPolicy()


def failed(kind: str = "exit", code: int = 1, *, node: str = "a", time_s: float = 1.0, **known: object) -> Failure:
    return Failure(node, kind, code, rank=0, time_unix_s=time_s, **known)  # type: ignore[arg-type]


def chosen(policy: RetryPolicy, *failures: Failure, history: tuple[Decision, ...] = (), restarts: int = 5) -> Decision:
    return decide(policy, history, failures, run_id="r1", max_restarts=restarts)


def after_steps(*steps: int | None, stop: int = 2, restarts: int = 99) -> list[bool]:
    """Whether ranks start again after attempts that ended at these steps."""
    policy, history, found = replace(POLICY, stop_after_no_progress=stop), (), []
    for step in steps:
        decision = chosen(policy, failed(step=step), history=history, restarts=restarts)
        found.append(decision.again)
        history = (*history, decision)
    return found


def test_the_first_failure_of_all_nodes_decides_and_victims_only_follow() -> None:
    victim = failed("node", node="a", time_s=1.0, only_lost=True)
    quiet = Failure("c", step=12)
    culprit = failed("config", 65, node="b", time_s=3.0)
    late = failed("signal", 137, node="d", time_s=4.0)
    found = chosen(POLICY, quiet, victim, late, culprit)
    assert (found.again, found.failure.node, found.step) == (False, "b", 12)
    assert found.reason == "config is in failure.no_retry_on"


@pytest.mark.parametrize(
    ("retry_on", "no_retry_on", "failure", "again"),
    [
        (("signal",), (), failed("signal", 137), True),
        (("signal",), (), failed("exit", 1), False),
        (("exit",), ("exit:3",), failed("exit", 3), False),
        (("exit",), ("exit:3",), failed("exit", 4), True),
        (("exit:75",), (), failed("preempt", 75), True),
        (("signal",), ("exit:137",), failed("signal", 137), False),
        (("exit:2",), ("config",), failed("config", 2), True),
        (("exit", "hang"), ("hang",), failed("hang", 125), False),
        ((), (), failed("signal", 137), False),
    ],
)
def test_lists_name_kinds_and_numbers_and_a_number_outweighs_a_kind(
    retry_on: tuple[str, ...], no_retry_on: tuple[str, ...], failure: Failure, *, again: bool
) -> None:
    assert chosen(RetryPolicy(retry_on=retry_on, no_retry_on=no_retry_on), failure).again is again


@given(st.sampled_from(KINDS), st.integers(1, 255))
def test_by_default_all_is_retried_but_what_would_fail_again(kind: str, code: int) -> None:
    assert chosen(POLICY, failed(kind, code)).again is (kind not in ("config", "import_error"))


def test_a_restart_needs_one_that_is_left_and_all_nodes() -> None:
    once = chosen(POLICY, failed(), restarts=1)
    assert once.again
    again = chosen(POLICY, failed(), history=(once,), restarts=1)
    assert (again.again, again.reason, again.attempt) == (False, "the only restart is used", 1)
    assert not chosen(POLICY, failed(), Failure("b", leaving=True)).again
    assert not chosen(POLICY, failed(), Failure("b", done=True)).again


def test_a_hang_is_not_retried_where_its_action_is_to_stop() -> None:
    found = decide(POLICY, (), [failed("hang", 125)], run_id="r", max_restarts=5, hang_stops=True)
    assert (found.again, found.reason) == (False, "failure.hang.action is dump_and_stop")
    assert decide(POLICY, (), [failed("exit", 1)], run_id="r", max_restarts=5, hang_stops=True).again


@pytest.mark.parametrize(
    ("steps", "again"),
    [
        ((5, 5, 5), [True, True, False]),
        ((5, 5, 6, 6, 6), [True, True, True, True, False]),
        ((5, 9, 7, 8), [True, True, True, False]),
        ((None, None, None), [True, True, False]),
        ((None, None, 1, 2, 3), [True] * 5),
        ((3, None, None), [True, True, False]),
    ],
)
def test_restarts_in_a_row_without_a_newer_step_are_the_last(steps: tuple[int | None, ...], again: list[bool]) -> None:
    assert after_steps(*steps) == again


def test_what_stopped_for_want_of_progress_says_so() -> None:
    policy = replace(POLICY, stop_after_no_progress=1)
    first = chosen(policy, failed(step=5))
    assert chosen(policy, failed(step=5), history=(first,)).reason == (
        "1 restart in a row made no progress: none came further than step 5"
    )
    blind = chosen(policy, failed())
    assert chosen(policy, failed(), history=(blind,)).reason.endswith("no step was seen to be done")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_a_run_that_moves_often_enough_is_never_given_up(gains: list[int], stop: int) -> None:
    steps = [sum(gains[: index + 1]) for index in range(len(gains))]
    expected = []
    for index in range(len(steps)):
        best = [max(steps[:each], default=-1) for each in range(index + 1)]
        still = [steps[each] <= best[each] for each in range(1, index + 1)]
        expected.append(not (len(still) >= stop and all(still[-stop:])))
    found = after_steps(*steps, stop=stop)
    until = expected.index(False) + 1 if False in expected else len(expected)
    assert found[:until] == expected[:until]


@given(
    st.floats(0, 1e4),
    st.floats(1, 100),
    st.floats(0, 1e5),
    st.floats(0, 1),
    st.integers(0, 10_000),
    st.text(max_size=9),
)
def test_waits_grow_up_to_a_limit_and_vary_by_their_jitter(
    initial: float, factor: float, more: float, jitter: float, restarts: int, run_id: str
) -> None:
    policy = RetryPolicy(initial, factor, initial + more, jitter)
    found = wait_of(policy, run_id, restarts)
    exact = wait_of(replace(policy, jitter=0.0), run_id, restarts)
    assert exact * (1 - jitter) - 2e-3 <= found <= exact <= policy.max_s + 1e-3
    assert wait_of(replace(policy, jitter=0.0), run_id, restarts + 1) >= exact
    assert found == wait_of(policy, run_id, restarts), "every node of a run waits alike"


def test_waits_double_and_differ_between_runs_and_restarts() -> None:
    steady = RetryPolicy(5.0, 2.0, 60.0, 0.0)
    assert [wait_of(steady, "r", each) for each in range(6)] == [5, 10, 20, 40, 60, 60]
    flat = RetryPolicy(10.0, 1.0, 10.0, 0.5)
    waits = {wait_of(flat, run_id, each) for run_id in ("r1", "r2") for each in range(5)}
    assert len(waits) == 10
    assert max(waits) - min(waits) > 1.0


def test_policies_and_decisions_survive_json() -> None:
    policy = RetryPolicy(retry_on=("exit:3",), stop_after_no_progress=2)
    assert policy_from(json.loads(json.dumps(asdict(policy)))) == policy
    decision = chosen(POLICY, failed(step=3))
    assert decision_from(json.loads(json.dumps(decision.as_saved()))) == decision
    assert decision.as_dict()["host"] == "a"


def fault(node: str = "a", **known: object) -> Failure:
    return failed("node", 1, node=node, **known)


def test_a_lost_node_is_left_out_of_what_follows_and_one_that_may_not_start_again_is_not() -> None:
    lost, victim = fault("b", lost=True, time_s=5.0), fault("a", only_lost=True, time_s=1.0)
    found = chosen(POLICY, victim, lost)
    assert (found.again, found.failure.node, found.excludes) == (True, "b", ("b",))
    both = chosen(POLICY, lost, fault("c", lost=True))
    assert set(both.excludes) == {"b", "c"}
    assert chosen(replace(POLICY, retry_on=("exit",)), lost).excludes == ()
    assert not chosen(POLICY, lost, restarts=0).again


def test_a_machine_is_left_out_at_the_fault_that_was_said_whatever_lies_between() -> None:
    policy, history = replace(POLICY, exclude_after=2), ()
    rounds = [fault("a"), fault("b"), failed("exit", 3, node="a"), fault("a", only_lost=True), fault("a"), fault("b")]
    found = []
    for each in rounds:
        decision = chosen(policy, each, history=history, restarts=9)
        found.append(decision.excludes)
        history = (*history, decision)
    assert found == [(), (), (), (), ("a",), ("b",)]
    assert chosen(POLICY, fault("a"), history=history, restarts=9).excludes == ()
    assert str(policy).endswith("; a node is left out after 2 of its faults")


def test_what_agents_tell_of_a_decision_is_enough_to_look_back_at_it() -> None:
    decision = chosen(replace(POLICY, exclude_after=1), fault("a", step=3, evidence="ECC"))
    told = told_decision(json.loads(json.dumps(decision.as_dict())))
    assert told == replace(decision, failure=replace(decision.failure, time_unix_s=0.0, step=None))
