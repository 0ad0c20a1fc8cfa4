"""The failure policy in the words of JobSet and of the Job below it."""

from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.base import Limits
from meshwright.clusters.kubernetes_policy import AGAIN_CODES, wants
from meshwright.clusters.retry import RetryPolicy
from tests.clusters.test_kubernetes import REQUEST, _objects


@pytest.mark.parametrize(
    ("kind", "never"), [("preempt", "exit:75"), ("signal", "exit:137"), ("node", "node"), ("preempt", "preempt")]
)
def test_what_is_never_retried_is_not_here_either(kind: str, never: str) -> None:
    assert wants(RetryPolicy(), kind)
    assert not wants(RetryPolicy(no_retry_on=(never,)), kind)
    assert AGAIN_CODES == (75, 137)


def test_the_policy_of_a_job_is_that_of_its_jobset_and_of_the_job_below_it() -> None:
    def policies(limits: Limits) -> tuple[Any, Any, Any]:
        _, found = _objects(request=replace(REQUEST, limits=limits))
        jobset: Any = found["spec"]
        below = jobset["replicatedJobs"][0]["template"]["spec"]
        env = below["template"]["spec"]["containers"][0]["env"]
        label = [each["valueFrom"]["fieldRef"]["fieldPath"] for each in env if each["name"] == "MESHWRIGHT_RESTARTS"]
        return jobset["failurePolicy"], below.get("podFailurePolicy"), label

    assert policies(Limits()) == ({"maxRestarts": 0}, None, [])
    jobset, below, label = policies(Limits(3))
    given_up = {"name": "givenUp", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset == {"maxRestarts": 3, "rules": [given_up]}
    assert label == ["metadata.labels['jobset.sigs.k8s.io/restart-attempt']"]
    gone, codes = below["rules"]
    assert gone == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    asked = {"containerName": "node", "operator": "NotIn", "values": [75, 137]}
    assert codes == {"action": "FailJob", "onExitCodes": asked}
    never = RetryPolicy(no_retry_on=("signal", "node"))
    _, below, _ = policies(Limits(3, retry=never))
    assert (below["rules"][0]["action"], below["rules"][1]["onExitCodes"]["values"]) == ("FailJob", [75])


@pytest.mark.parametrize("limits", [Limits(), Limits(3)])
def test_a_job_that_may_do_with_fewer_pods_ends_with_its_first(limits: Limits) -> None:
    def below(limits: Limits) -> Any:
        _, found = _objects(request=replace(REQUEST, limits=limits))
        jobset: Any = found["spec"]
        return jobset["replicatedJobs"][0]["template"]["spec"]

    assert "successPolicy" not in below(limits)
    fewer = below(replace(limits, fewest_nodes=1))
    assert fewer["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert fewer["completionMode"] == "Indexed"
    assert fewer.get("podFailurePolicy") == below(limits).get("podFailurePolicy")
