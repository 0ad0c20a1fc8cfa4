"""One training on one cluster: everything that a prediction is made from."""

from dataclasses import dataclass, field

from meshwright.clusters.simulated.cluster import Cluster
from meshwright.clusters.simulated.efficiency import Efficiency, fitted
from meshwright.clusters.simulated.layout import Engine, Layout
from meshwright.clusters.simulated.model import Transformer
from meshwright.parallel.work import Work

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model on a cluster.

    Args:
        model: what is trained.
        layout: how it is dealt.
        cluster: to what.
        engine: how each rank goes about it.
        efficiency: of the hardware; the catalog's by default.

    Raises:
        ValueError: a layout that does not cover the cluster.
    """

    model: Transformer
    layout: Layout
    cluster: Cluster
    engine: Engine = field(default_factory=Engine)
    efficiency: Efficiency = field(default_factory=fitted)

    def __post_init__(self) -> None:
        layout = self.layout
        if layout.num_ranks != self.cluster.num_gpus:
            raise ValueError(
                f"tp {layout.tp} x cp {layout.cp} x dp {layout.dp} x pp {layout.pp} are {layout.num_ranks} ranks; "
                f"the cluster has {self.cluster.num_gpus} GPUs"
            )

    @property
    def tokens(self) -> float:
        """Of a micro-batch on one rank."""
        return self.layout.micro_batch * self.model.sequence / self.layout.cp

    def busy_s(self, work: Work) -> float:
        """Seconds of its GPUs to compute so much."""
        return self.efficiency.busy_s(work, self.cluster.gpu)

    def moved_s(self, num_bytes: float) -> float:
        """Seconds to read and write so many bytes in all."""
        return self.efficiency.memory_s(num_bytes, self.cluster.gpu)

    def gathered_s(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """Seconds of an all-gather or reduce-scatter over ranks of an axis of `size`, `stride` ranks apart."""
        return self.efficiency.gather_s(num_bytes, self.cluster.group(size, stride))
