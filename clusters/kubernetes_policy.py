"""The failure policy of a run in the words of JobSet and of the Jobs below it. Pure.

Agents start ranks again by themselves while all pods are there. A pod that goes, or has to, ends its Job, and the
JobSet starts all pods again; a run that its agents gave up ends the JobSet. The exit code of a pod tells which it is.
"""

from collections.abc import Mapping
from typing import Any

from meshwright.clusters.failure import Failure
from meshwright.clusters.request import Limits
from meshwright.clusters.retry import RetryPolicy, unwanted

__all__ = ["AGAIN_CODE", "AGAIN_CODES", "RESTARTS", "job_policy", "jobset_policy", "wants"]

AGAIN_CODE = 75
"""Exit code of a pod by which it asks for all pods to be started again: of a rank that saved and left."""

AGAIN_CODES = (AGAIN_CODE, 137)
"""After these pods start again; the second is that of a container that is killed, such as for want of memory."""

RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
"""Label of a pod that tells how often its JobSet has started all of them again."""

_RULE = {"name": "givenUp", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def wants(policy: RetryPolicy, *kinds: str) -> bool:
    """Whether a run goes on after each of some kinds of failure.

    >>> wants(RetryPolicy(), "node", "preempt"), wants(RetryPolicy(no_retry_on=("exit:75",)), "preempt")
    (True, False)
    """
    codes = {"preempt": AGAIN_CODE, "signal": 137, "node": 69}
    return not any(unwanted(policy, Failure("", kind, codes[kind])) for kind in kinds)


def jobset_policy(limits: Limits) -> dict[str, Any]:
    """What a JobSet does when its Job has failed."""
    rules = {"rules": [_RULE]} if limits.max_restarts else {}
    return {"maxRestarts": limits.max_restarts, **rules}


def job_policy(limits: Limits) -> Mapping[str, Any]:
    """What a Job makes of a pod that failed: one that went with its node counts, a run that was given up is the end.

    Kubernetes does not say in these rules why a pod had to go, so both kinds of such failures must be worth it. Of an
    elastic run some pods may be pending, or wait, to the end: it ends with its first one.
    """
    ends = {} if limits.fewest_nodes is None else {"successPolicy": {"rules": [{"succeededIndexes": "0"}]}}
    if not limits.max_restarts:
        return ends
    codes = [AGAIN_CODE, *([137] if wants(limits.retry, "signal") else [])]
    gone = "Count" if wants(limits.retry, "node", "preempt") else "FailJob"
    asked = {"containerName": "node", "operator": "NotIn", "values": codes}
    rules = [
        {"action": gone, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": asked},
    ]
    return {"podFailurePolicy": {"rules": rules}, **ends}
