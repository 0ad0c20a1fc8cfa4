"""What a job is: one frozen value, block by block, with every key described.

The models are loaded at their first use, because pydantic takes longer to import than everything here together.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.launch.spec.clusters import LocalCluster as LocalCluster
    from meshwright.launch.spec.clusters import SlurmCluster as SlurmCluster
    from meshwright.launch.spec.clusters import SshCluster as SshCluster
    from meshwright.launch.spec.conduct import Backoff as Backoff
    from meshwright.launch.spec.conduct import Checkpoint as Checkpoint
    from meshwright.launch.spec.conduct import Failure as Failure
    from meshwright.launch.spec.conduct import Logs as Logs
    from meshwright.launch.spec.conduct import Secret as Secret
    from meshwright.launch.spec.conduct import Sweep as Sweep
    from meshwright.launch.spec.data import Data as Data
    from meshwright.launch.spec.health import Health as Health
    from meshwright.launch.spec.job import Job as Job
    from meshwright.launch.spec.machines import NodeRange as NodeRange
    from meshwright.launch.spec.machines import Rendezvous as Rendezvous
    from meshwright.launch.spec.machines import Resources as Resources
    from meshwright.launch.spec.training import Model as Model
    from meshwright.launch.spec.training import Parallel as Parallel
    from meshwright.launch.spec.training import Train as Train

__all__ = [
    "Backoff",
    "Checkpoint",
    "Data",
    "Failure",
    "Health",
    "Job",
    "LocalCluster",
    "Logs",
    "Model",
    "NodeRange",
    "Parallel",
    "Rendezvous",
    "Resources",
    "Secret",
    "SlurmCluster",
    "SshCluster",
    "Sweep",
    "Train",
]

_HOMES = {
    **dict.fromkeys(("Backoff", "Checkpoint", "Failure", "Logs", "Secret", "Sweep"), "conduct"),
    **dict.fromkeys(("NodeRange", "Rendezvous", "Resources"), "machines"),
    **dict.fromkeys(("LocalCluster", "SlurmCluster", "SshCluster"), "clusters"),
    **dict.fromkeys(("Model", "Parallel", "Train"), "training"),
    "Data": "data",
    "Health": "health",
    "Job": "job",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
