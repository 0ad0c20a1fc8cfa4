"""A run in pods on fewer of them than it may have: its plan, and what its ranks read. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshwright.clusters.base import StartPlan, under_names

__all__ = ["SIZES_FILE", "plan_of_pods", "sized_files"]

SIZES_FILE = "sizes.json"
"""Of the files of pods: number of nodes -> what differs in job.json; only those on which the job can run."""


def plan_of_pods(plan: StartPlan, pods: Sequence[int]) -> StartPlan:
    """A plan for more pods on some of them, which become its first nodes.

    Args:
        plan: with a node per pod.
        pods: indices of those that take part, in order.
    """
    return replace(plan, nodes=under_names(plan.nodes, [plan.nodes[index].name for index in pods]))


def sized_files(files: Mapping[str, str], number: int) -> dict[str, str]:
    """Files of ranks on a number of nodes.

    Args:
        files: on the most nodes, with those of all sizes.
        number: of nodes.

    >>> sized_files({"job.json": '{"nodes": 3, "a": {"b": 1, "c": 2}}', "sizes.json": '{"2": {"a": {"b": 7}}}'}, 2)
    {'job.json': '{"nodes": 3, "a": {"b": 7, "c": 2}}'}
    """
    other = json.loads(files[SIZES_FILE])[str(number)]
    kept = {name: text for name, text in files.items() if name != SIZES_FILE}
    return {**kept, "job.json": json.dumps(_merged(json.loads(kept["job.json"]), other))}


def _merged(whole: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    deep = {key: _merged(whole[key], value) for key, value in other.items() if isinstance(value, dict)}
    return {**whole, **other, **deep}
