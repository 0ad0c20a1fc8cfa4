"""meshwright: one YAML describes a model, a mesh and a cluster.

The same file is proved right on a laptop, timed on paper at any scale, and launched on a real cluster.
Names that need torch are loaded at their first use, so that specs and meshes stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from meshwright.parallel.mesh import Mesh as Mesh

if TYPE_CHECKING:
    from meshwright.launch.predict import Prediction as Prediction
    from meshwright.launch.predict import simulate as simulate
    from meshwright.moe.expert_pass import Experts as Experts
    from meshwright.parallel.deferred import deferred as deferred
    from meshwright.parallel.deferred import materialise as materialise
    from meshwright.parallel.verify import ParityReport as ParityReport
    from meshwright.parallel.verify import verify as verify
    from meshwright.parallel.wrap import ParallelModel as ParallelModel
    from meshwright.parallel.wrap import parallelize as parallelize

__version__ = "0.1.0"
__all__ = ["Experts", "Mesh", "ParallelModel", "ParityReport", "Prediction", "deferred", "materialise", "parallelize", "simulate", "verify"]

_HOMES = {
    "Experts": "meshwright.moe.expert_pass",
    "ParallelModel": "meshwright.parallel.wrap",
    "ParityReport": "meshwright.parallel.verify",
    "Prediction": "meshwright.launch.predict",
    "deferred": "meshwright.parallel.deferred",
    "materialise": "meshwright.parallel.deferred",
    "parallelize": "meshwright.parallel.wrap",
    "simulate": "meshwright.launch.predict",
    "verify": "meshwright.parallel.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshwright' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
