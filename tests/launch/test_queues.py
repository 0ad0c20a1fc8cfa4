"""Runs that a queue has are found again, and nothing is imported for it that only jobs need."""

import subprocess
import sys

import pytest

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.slurm import SlurmQueue
from meshwright.launch.queues import queue_of


def test_a_queue_is_found_by_its_kind() -> None:
    assert isinstance(queue_of("slurm", "12"), SlurmQueue)
    assert isinstance(queue_of("kubernetes", "context/space/JobSet/name"), KubernetesQueue)
    with pytest.raises(UnavailableError, match="a queue of type 'lsf', which this version does not have"):
        queue_of("lsf", "12")


@pytest.mark.parametrize("command", ["ps", "logs", "cancel"])
def test_who_looks_at_runs_imports_nothing_that_reads_jobs(command: str) -> None:
    program = (
        f"import sys, meshwright.launch.commands.{command}; print({{'pydantic', 'yaml', 'torch'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
