"""What 512 nodes of 8 GPUs cost before anything starts: a dry run of the launch, and its rank arithmetic rehearsed.

Each number is one command of a fresh interpreter, from its start to its end. `python -m benchmarks.dry_run [--json]`
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from meshwright.parallel.mesh import AXES, Mesh

__all__ = ["CLUSTERS", "JOB", "dry_run", "main", "measure", "rehearse_ranks", "write_job"]

NODES, PER_NODE = 512, 8
JOB: dict[str, Any] = {
    "name": "big",
    "nodes": NODES,
    "model": {"architecture": "llama", "config": {"num_hidden_layers": 64, "num_attention_heads": 64}},
    "data": {"files": ["text.txt"], "sequence_length": 4096},
    "parallel": {"pp": 8, "dp": 64, "tp": 8, "schedule": "1f1b", "num_microbatches": 16},
    "train": {"batch_size": 1024, "steps": 10},
}
CLUSTERS: dict[str, dict[str, Any]] = {
    "slurm": {"type": "slurm", "gpus_per_node": PER_NODE},
    "ssh": {
        "type": "ssh",
        "hosts": [
            {"name": f"gpu{index:03d}", "addr": f"10.0.{index // 250}.{index % 250 + 1}", "slots": PER_NODE}
            for index in range(NODES)
        ],
    },
}


def write_job(folder: Path, cluster: str) -> Path:
    """The job on one of the clusters, as a file; JSON is YAML."""
    path = folder / f"{cluster}.yaml"
    path.write_text(json.dumps({**JOB, "cluster": CLUSTERS[cluster]}, indent=1))
    return path


def dry_run(job: Path, *words: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "meshwright.launch.cli", "launch", str(job), "--dry-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def rehearse_ranks(plan: Mapping[str, Any], mesh: Mesh) -> dict[str, int]:
    """Every rank's place, worked out as each node and each rank would; every group of every axis.

    Args:
        plan: of a launch, as `--dry-run --json` prints it.
        mesh: of the job.

    Returns:
        How many ranks, nodes and groups there are, and on how many nodes the widest group of each axis lies.

    Raises:
        AssertionError: for a rank that is missing, twice, in two groups of an axis, or elsewhere than its neighbours.
    """
    nodes = plan["nodes"]
    firsts = [node["ranks"][0] for node in nodes]
    assert [rank for node in nodes for rank in node["ranks"]] == list(range(mesh.world_size)), "ranks in order, once"
    assert all(after - before == PER_NODE for before, after in pairwise(firsts)), "as many on every node"
    assert [node["index"] for node in nodes] == list(range(len(nodes))), "nodes in order"
    assert len({log for node in nodes for log in node["logs"]}) == mesh.world_size, "a log each"
    home = {rank: node["index"] for node in nodes for rank in node["ranks"]}
    found = {"ranks": mesh.world_size, "nodes": len(nodes)}
    for rank in range(mesh.world_size):
        assert mesh.rank(mesh.coordinates(rank)) == rank, rank
    for axis in (axis for axis in AXES if mesh.degree(axis) > 1):
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size)), axis
        assert {len(group) for group in groups} == {mesh.degree(axis)}, axis
        found[f"{axis} groups"] = len(groups)
        found[f"nodes of a {axis} group"] = max(len({home[rank] for rank in group}) for group in groups)
    return found


def _rehearse(job: Path) -> None:
    """One command: the plan of a job and its ranks, without a process for any of them."""
    from meshwright.launch.load import load_job
    from meshwright.launch.registry import cluster_of
    from meshwright.launch.request import request_of

    loaded = load_job(job)
    plan = cluster_of(loaded).plan(request_of(loaded, "rehearsed", base=Path.cwd(), reveal=False))
    sys.stdout.write(json.dumps(rehearse_ranks(plan.as_dict(), loaded.job.mesh)) + "\n")


def measure(rounds: int) -> dict[str, Any]:
    """Median and slowest seconds of every command."""
    with tempfile.TemporaryDirectory(prefix="meshwright-bench-") as folder:
        jobs = {cluster: write_job(Path(folder), cluster) for cluster in CLUSTERS}
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for cluster, job in jobs.items():
                start_s = time.perf_counter()
                dry_run(job)
                middle_s = time.perf_counter()
                command = [sys.executable, "-m", "benchmarks.dry_run", "--rehearse", str(job)]
                ranks = json.loads(subprocess.run(command, capture_output=True, check=True, env=os.environ).stdout)
                times.setdefault(f"dry run, {cluster}", []).append(middle_s - start_s)
                times.setdefault(f"ranks, {cluster}", []).append(time.perf_counter() - middle_s)
    seconds = {name: {"median": median(each), "slowest": max(each)} for name, each in times.items()}
    return {"command_s": seconds, "rehearsed": ranks, "limit_s": 2.0}


def main() -> None:
    """Runs the commands and prints how long they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rehearse", type=Path, metavar="JOB", help="only rehearse the ranks of a job")
    arguments = parser.parse_args()
    if arguments.rehearse is not None:
        _rehearse(arguments.rehearse)
        return
    result = measure(arguments.rounds)
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, seconds in result["command_s"].items():
        sys.stdout.write(f"{name:<16} {seconds['median']:6.2f} s, slowest {seconds['slowest']:6.2f} s\n")
    sys.stdout.write(", ".join(f"{count} {name}" for name, count in result["rehearsed"].items()) + "\n")


if __name__ == "__main__":
    main()
