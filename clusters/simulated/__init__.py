"""A training on a cluster that exists as numbers: how long a step takes, where the time goes, what memory it needs."""

from meshwright.clusters.simulated.cluster import Cluster as Cluster
from meshwright.clusters.simulated.efficiency import Efficiency as Efficiency
from meshwright.clusters.simulated.efficiency import fitted as fitted
from meshwright.clusters.simulated.layout import Engine as Engine
from meshwright.clusters.simulated.layout import Layout as Layout
from meshwright.clusters.simulated.memory import Memory as Memory
from meshwright.clusters.simulated.memory import memory as memory
from meshwright.clusters.simulated.model import Transformer as Transformer
from meshwright.clusters.simulated.step import Step as Step
from meshwright.clusters.simulated.step import step as step
from meshwright.clusters.simulated.training import Training as Training

__all__ = [
    "Cluster",
    "Efficiency",
    "Engine",
    "Layout",
    "Memory",
    "Step",
    "Training",
    "Transformer",
    "fitted",
    "memory",
    "step",
]
