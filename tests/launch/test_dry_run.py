"""512 nodes of 8 GPUs on paper: where every rank is, and what a dry run of them costs."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dry_run import CLUSTERS, dry_run, rehearse_ranks, write_job
from meshwright.launch.load import load_job


def _cpu_s() -> float:
    """Of children that have ended; a loaded machine does not change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_dry_run_of_512_nodes_takes_less_than_two_seconds(cluster: str, tmp_path: Path) -> None:
    job, before_s = write_job(tmp_path, cluster), _cpu_s()
    told = dry_run(job)
    assert _cpu_s() - before_s < 2.0
    assert told.count("\nnode ") == 512
    assert "log      logs/rank-4095.log" in told


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_rank_of_512_nodes_has_one_place_and_tensor_groups_stay_on_a_node(cluster: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, cluster)
    plan, mesh = json.loads(dry_run(job, "--json")), load_job(job).job.mesh
    found = rehearse_ranks(plan, mesh)
    assert (found["ranks"], found["nodes"], found["nodes of a tp group"]) == (4096, 512, 1)
    assert (found["tp groups"], found["dp groups"], found["pp groups"]) == (512, 64, 512)
    for damaged in (_swapped(plan), _shifted(plan)):
        with pytest.raises(AssertionError):
            rehearse_ranks(damaged, mesh)


def _swapped(plan: dict[str, Any]) -> dict[str, Any]:
    first, second, *rest = plan["nodes"]
    return {**plan, "nodes": [{**first, "ranks": second["ranks"]}, {**second, "ranks": first["ranks"]}, *rest]}


def _shifted(plan: dict[str, Any]) -> dict[str, Any]:
    first, second, *rest = plan["nodes"]
    longer, shorter = [*first["ranks"], second["ranks"][0]], second["ranks"][1:]
    return {**plan, "nodes": [{**first, "ranks": longer}, {**second, "ranks": shorter}, *rest]}
