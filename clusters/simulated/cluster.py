"""A cluster as numbers, and which of its links a group of ranks talks over.

Ranks count tp fastest, then cp, dp, pp. Groups of one axis talk at the same time, so the ranks of a group bring the
shares of the network that are their own, no more.
"""

from dataclasses import dataclass
from math import ceil

from meshwright.clusters.hardware import Gpu

__all__ = ["Cluster", "Group"]


@dataclass(frozen=True)
class Group:
    """Ranks of one axis.

    Args:
        size: ranks.
        per_node: of them on one node.
        bytes_per_s: of the slowest link of a ring through them, as the wire promises.
        nvlink_bytes_per_s: of the links within a node.
    """

    size: int
    per_node: int
    bytes_per_s: float
    nvlink_bytes_per_s: float

    @property
    def nodes(self) -> int:
        """Nodes that it spans."""
        return ceil(self.size / self.per_node)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Args:
        gpu: their kind.
        num_gpus: all of them.
        gpus_per_node: joined by NVLink.
        network_bytes_per_s: between nodes, per GPU and direction; what the catalog calls usual where None.
        nics_per_gpu: network cards of a GPU; 0.5 where two share one.
        fabric: that their network is, in `catalog/exchanges.yaml`: "rdma" (lossless) or "efa".

    Raises:
        ValueError: no GPUs.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    network_bytes_per_s: float | None = None
    nics_per_gpu: float = 1.0
    fabric: str = "rdma"

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.gpus_per_node < 1:
            raise ValueError(f"a cluster has GPUs: {self.num_gpus} in nodes of {self.gpus_per_node}")

    @property
    def network(self) -> float:
        """Bytes per second between nodes, of one GPU's share."""
        return self.gpu.network_bytes_per_s if self.network_bytes_per_s is None else self.network_bytes_per_s

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return ceil(self.num_gpus / self.gpus_per_node)

    def group(self, size: int, stride: int = 1) -> Group:
        """The ranks of an axis of `size` whose neighbours are `stride` ranks apart.

        >>> from meshwright.clusters.hardware import gpu
        >>> selene = Cluster(gpu=gpu("A100"), num_gpus=64)
        >>> selene.group(8).bytes_per_s, selene.group(4, 8).per_node, selene.group(16).bytes_per_s
        (300000000000.0, 1, 200000000000.0)
        """
        per_node = max(1, min(size, self.gpus_per_node // stride))
        nvlink = self.gpu.nvlink_bytes_per_s
        return Group(size, per_node, nvlink if per_node >= size else min(nvlink, self.network * per_node), nvlink)
