"""A start plan back from its JSON form."""

from collections.abc import Mapping
from typing import Any

from meshwright.clusters.base import Limits, Meeting, NodePlan, StartPlan, Submission
from meshwright.clusters.request import Earlier
from meshwright.clusters.retry import decision_from, policy_from
from meshwright.clusters.watching import watch_from

__all__ = ["plan_from"]


def plan_from(saved: Mapping[str, Any]) -> StartPlan:
    """The plan that `as_dict` was taken of."""
    fields = {name: _tuples(value) for name, value in saved.items() if name != "world_size"}
    submission = saved["submission"]
    return StartPlan(
        **{
            **fields,
            "meeting": Meeting(**_deep(saved["meeting"])),
            "limits": _limits(saved["limits"]),
            "nodes": tuple(NodePlan(**_deep(node)) for node in saved["nodes"]),
            "submission": None if submission is None else Submission(**_deep(submission)),
        }
    )


def _limits(saved: Mapping[str, Any]) -> Limits:
    past = tuple(map(decision_from, saved["past"]))
    after = tuple(Earlier(**each) for each in saved["after"])
    kept = {"past": past, "after": after, "sizes": tuple(saved["sizes"]), "watch": watch_from(saved["watch"])}
    return Limits(**{**saved, **kept, "retry": policy_from(saved["retry"])})


def _deep(block: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in block.items()}


def _tuples(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
