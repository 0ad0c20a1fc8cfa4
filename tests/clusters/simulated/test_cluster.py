"""Which link carries a group of ranks."""

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated.cluster import Cluster

H100 = gpu("H100")


def _cluster(**changed: float) -> Cluster:
    return Cluster(**{"gpu": H100, "num_gpus": 64, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "stride", "per_node", "nodes", "gigabytes"),
    [
        (8, 1, 8, 1, 450),  # within a node
        (2, 4, 2, 1, 450),
        (16, 1, 8, 2, 400),  # a whole node's network
        (8, 8, 1, 8, 50),  # one GPU of each node
        (16, 4, 2, 8, 100),  # two GPUs of each node
    ],
)
def test_a_group_has_the_network_of_its_own_ranks(
    size: int, stride: int, per_node: int, nodes: int, gigabytes: float
) -> None:
    group = _cluster().group(size, stride)
    assert (group.per_node, group.nodes, group.bytes_per_s / 1e9) == (per_node, nodes, gigabytes)


def test_no_group_is_faster_than_its_nvlinks() -> None:
    assert _cluster(network_bytes_per_s=1e12).group(16).bytes_per_s == H100.nvlink_bytes_per_s


def test_the_network_is_the_usual_one_unless_told() -> None:
    assert _cluster().network == H100.network_bytes_per_s
    assert _cluster(network_bytes_per_s=1e9).network == 1e9


def test_a_cluster_without_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="has GPUs"):
        _cluster(num_gpus=0)
