"""Run ids of tests: the end of a run sweeps whatever carries its id on this machine, so no two tests may share one."""

import os

__all__ = ["own"]


def own(run_id: str) -> str:
    """A run id that no other process of tests uses."""
    return f"{run_id}-{os.getpid()}"
